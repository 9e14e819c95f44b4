"""Stands for TransformerEngine where it cannot be installed: its modules' parameters, without anything that computes.

Only what megatron-core imports and subclasses (``megatron/core/extensions/transformer_engine.py``). The names, shapes
and dtypes of the parameters are those of TransformerEngine's `pytorch/module/linear.py`, `layernorm_linear.py` and
`rmsnorm.py`. Goes on the path of child processes of tests, never of others: its presence changes what megatron-core is.
"""

from transformer_engine import common, pytorch

__version__ = "2.20.2"
__all__ = ["common", "pytorch"]
