"""Rule-based rewards: the format of a response and the correctness of its boxed answer."""
