"""perl_megatron: permuted GRPO for multi-image vision-language policies on megatron-core."""

__version__ = "0.1.0"
