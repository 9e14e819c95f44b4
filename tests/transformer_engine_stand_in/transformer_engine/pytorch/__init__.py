"""`transformer_engine.pytorch`: its modules in plain torch, forward only, as far as a packed row needs them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention


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
        return_bias: bool,
        sequence_parallel: bool,
        params_dtype: torch.dtype,
        device: Any,
        tp_group: Any = None,
        **unused: Any,
    ):
        super().__init__()
        self.params_dtype, self.device = params_dtype, device
        self.return_bias, self.sequence_parallel, self.tp_group = return_bias, sequence_parallel, tp_group
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.parallel_mode, self.use_bias, self.tp_size = parallel_mode, bias, tp_size
        self.weight = self._empty(self.out_features, self.in_features)
        # Without a bias the attribute is an empty tensor and no parameter.
        self.bias = self._empty(self.out_features) if bias else torch.Tensor()

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        """The output, and the bias apart from it where it is to be returned; without a gradient across ranks."""
        assert not self.sequence_parallel
        output = linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            dist.all_reduce(output, group=self.tp_group)
        if self.return_bias:
            return output, self.bias
        return output + self.bias if self.use_bias else output


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, normalization: str, eps: float, **options: Any):
        assert normalization == "RMSNorm", "a layer norm would have a bias, too"
        super().__init__(in_features, out_features, **options)
        self.eps = eps
        self.layer_norm_weight = self._empty(in_features)
        self.layer_norm_bias = None

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        """The norm, then as ``Linear``."""
        return super().forward(rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), is_first_microbatch)


class RMSNorm(_Module):
    def __init__(self, hidden_size: int, *, eps: float, params_dtype: torch.dtype, device: Any, **unused: Any):
        super().__init__()
        self.params_dtype, self.device, self.eps = params_dtype, device, eps
        self.weight = self._empty(hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self.weight, self.eps)


class DotProductAttention(_Module):
    """Attention within packed segments. Keeps the arguments of each call in ``calls``."""

    def __init__(self, *, kv_channels: int, softmax_scale: float | None, **unused: Any):
        super().__init__()
        self.scale = softmax_scale or kv_channels**-0.5
        self.calls: list[dict[str, Any]] = []
        self.register_load_state_dict_post_hook(_may_lack_own_state)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> torch.Tensor:
        """[N, heads, D] each → [N, heads · D]."""
        self.calls.append({"query": query, "key": key, "value": value, "attention_mask": attention_mask, **options})
        assert options["qkv_format"] == "thd", "attention over a batch of rows is not here"
        queries, keys = options["cu_seqlens_q"].diff().tolist(), options["cu_seqlens_kv"].diff().tolist()
        lengths = ((query, queries), (key, keys), (value, keys))
        segments = zip(*(tensor.transpose(0, 1).split(parts, 1) for tensor, parts in lengths), strict=True)
        outputs = [self._attend(*segment, options["attn_mask_type"]) for segment in segments]
        return torch.cat(outputs, 1).transpose(0, 1).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask_type: str) -> torch.Tensor:
        before = {"padding": None, "padding_causal": 0, "padding_causal_bottom_right": key.shape[1] - query.shape[1]}
        mask = None
        if (offset := before[mask_type]) is not None:
            mask = torch.arange(key.shape[1]) <= offset + torch.arange(query.shape[1])[:, None]
        return scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, scale=self.scale, enable_gqa=True
        )[0]


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
