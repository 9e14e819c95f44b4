"""Stands for TransformerEngine where it cannot be installed: its parameters and states, computed by plain torch.

Only what megatron-core imports and subclasses (``megatron/core/extensions/transformer_engine.py`` and ``optimizer/``).
The names, shapes and dtypes of the parameters are those of TransformerEngine's `pytorch/module/linear.py`,
`layernorm_linear.py` and `rmsnorm.py`, the form of the optimizer's state that of `pytorch/optimizers/fused_adam.py`.
None of its code and none of its kernels is here. Goes on the path of child processes of tests, never of others: its
presence changes what megatron-core is.
"""

from transformer_engine import common, pytorch

__version__ = "2.20.2"
__all__ = ["common", "pytorch"]
