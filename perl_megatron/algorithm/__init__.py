"""The equations of permuted GRPO as small pure functions: advantages, objective, aggregation, group filter."""
