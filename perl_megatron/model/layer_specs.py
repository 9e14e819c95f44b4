"""The one place that chooses the modules of a transformer layer: TransformerEngine's on CUDA in bfloat16, else torch's.

Both go through megatron-core's own ``TransformerLayer``, so a model has the same structure either way; the fused
modules of TransformerEngine hold the norms' weights under other names, which ``checkpoint`` maps back.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from perl_megatron.model.attention import TorchCoreAttention
from perl_megatron.model.segments import Segments
from perl_megatron.runtime import platform


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that allows sequence parallelism (megatron-core's own torch norm refuses): its gradient gets the flag."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, replicated over the tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class TorchSpecProvider(LocalSpecProvider):
    """megatron-core's local modules, with this package's norm and core attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """The norm's class."""
        return TorchRMSNorm

    def core_attention(self) -> type:
        """The core attention's class, for the language model and the vision tower alike."""
        return TorchCoreAttention


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether a policy with parameters of ``dtype`` gets TransformerEngine's layers here.

    Not in float32: fused attention, which packed sequences of images need, exists for 16-bit and 8-bit numbers only
    (support matrix of cuDNN's scaled dot product attention; flash-attention is the same).
    """
    return dtype is torch.bfloat16 and platform.is_cuda() and importlib.util.find_spec("transformer_engine") is not None


def choose_provider(dtype: torch.dtype) -> BackendSpecProvider:
    """TransformerEngine's modules where ``uses_transformer_engine``, else torch's."""
    return _transformer_engine_provider() if uses_transformer_engine(dtype) else TorchSpecProvider()


def _transformer_engine_provider() -> BackendSpecProvider:
    # Imported and subclassed here because on a machine without TransformerEngine the base class is only a placeholder.
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class SegmentedCoreAttention(TEDotProductAttention):
        """Takes the vision tower's ``Segments`` as TransformerEngine's packed 'thd' sequences."""

        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            segments = kwargs.get("packed_seq_params")
            if not isinstance(segments, Segments):
                return super().forward(query, key, value, *args, **kwargs)
            kwargs["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=segments.cumulative_lengths,
                cu_seqlens_kv=segments.cumulative_lengths,
                max_seqlen_q=segments.longest,
                max_seqlen_kv=segments.longest,
            )
            packed = (tensor.squeeze(1) for tensor in (query, key, value))
            return super().forward(*packed, *args, **kwargs).reshape(query.shape[0], 1, -1)

    class SegmentedProvider(TESpecProvider):
        def core_attention(self) -> type:
            return SegmentedCoreAttention

    return SegmentedProvider()


def block_spec(
    provider: BackendSpecProvider,
    num_layers: int,
    *,
    mask: AttnMaskType,
    layer: type[TransformerLayer] = TransformerLayer,
) -> TransformerBlockSubmodules:
    """``num_layers`` pre-norm layers (RMSNorm, self-attention, gated MLP) and the final norm."""
    fused = provider.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else provider.layer_norm(rms_norm=True)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    # Local norms are saved under the names that TransformerEngine's fused modules give them, so that training states
    # can go from one to the other.
    fused_names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    spec = ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend=provider),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else fused_names,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=provider.layer_norm(rms_norm=True))
