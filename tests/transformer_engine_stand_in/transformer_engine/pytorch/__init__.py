"""`transformer_engine.pytorch`: modules with parameters and no forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class _Module(torch.nn.Module):
    def get_extra_state(self) -> torch.Tensor:
        """Quantisation state, which is empty without fp8; part of every module's state dict."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """Takes what ``get_extra_state`` gave, or nothing."""
        assert state is None or state.numel() == 0

    def _empty(self, *shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(*shape, dtype=self.params_dtype, device=self.device))


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp_size: int,
        bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any,
        **unused: Any,
    ):
        super().__init__()
        self.params_dtype, self.device = params_dtype, device
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.parallel_mode, self.use_bias, self.tp_size = parallel_mode, bias, tp_size
        self.weight = self._empty(self.out_features, self.in_features)
        # Without a bias the attribute is an empty tensor and no parameter.
        self.bias = self._empty(self.out_features) if bias else torch.Tensor()


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, normalization: str, **options: Any):
        assert normalization == "RMSNorm", "a layer norm would have a bias, too"
        super().__init__(in_features, out_features, **options)
        self.layer_norm_weight = self._empty(in_features)
        self.layer_norm_bias = None


class RMSNorm(_Module):
    def __init__(self, hidden_size: int, *, params_dtype: torch.dtype, device: Any, **unused: Any):
        super().__init__()
        self.params_dtype, self.device = params_dtype, device
        self.weight = self._empty(hidden_size)


class DotProductAttention(_Module):
    def __init__(self, **unused: Any):
        super().__init__()
        self.register_load_state_dict_post_hook(_may_lack_own_state)


def _may_lack_own_state(module: torch.nn.Module, incompatible_keys: Any) -> None:
    """As in TransformerEngine, whose older checkpoints (and megatron-core's) have no state of the attention."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if "core_attention._extra_state" not in key]


class LayerNorm(_Module):
    """Only its name is needed."""


class GroupedLinear(_Module):
    """Only its name is needed."""


distributed = SimpleNamespace(CudaRNGStatesTracker=object)
ops = SimpleNamespace(Sequential=torch.nn.Sequential, FusibleOperation=_Module)
