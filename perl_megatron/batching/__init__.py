"""Which sequences of a mini-batch are computed together: what they cost, and a plan of micro-batches. No torch."""
