"""The one place that chooses the modules of a transformer layer: TransformerEngine's on CUDA in bfloat16, else torch's.

Both go through megatron-core's own ``TransformerLayer``, so a model has the same structure either way; the fused
modules of TransformerEngine hold the norms' weights under other names, which ``checkpoint`` maps back.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from enum import Enum
from functools import partial
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
from perl_megatron.model.shared_prompts import SharedPrompts
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
        """Takes this package's segments as TransformerEngine's packed 'thd' sequences."""

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            attn_mask_type: AttnMaskType,
            attention_bias: torch.Tensor | None = None,
            packed_seq_params: Any = None,
            num_splits: int | None = None,
        ) -> torch.Tensor:
            rest = {"attention_bias": attention_bias, "num_splits": num_splits}
            if not isinstance(packed_seq_params, (Segments, SharedPrompts)):
                rest["packed_seq_params"] = packed_seq_params
                return super().forward(query, key, value, attention_mask, attn_mask_type, **rest)
            attend = partial(super().forward, attention_mask=attention_mask, **rest)
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
            if isinstance(packed_seq_params, SharedPrompts):
                output = attend_with_shared_prompts(attend, query, key, value, packed_seq_params)
            else:
                lengths = packed_seq_params.cumulative_lengths, packed_seq_params.longest
                params = _thd(*lengths, *lengths)
                output = attend(query, key, value, attn_mask_type=attn_mask_type, packed_seq_params=params).flatten(1)
            return output.unsqueeze(1)

    class SegmentedProvider(TESpecProvider):
        def core_attention(self) -> type:
            return SegmentedCoreAttention

    return SegmentedProvider()


class _PackedMask(Enum):
    """megatron-core hands the name of a mask on to TransformerEngine, but has no member of this one."""

    padding_causal_bottom_right = 1


def _thd(query_ends: torch.Tensor, most_queries: int, key_ends: torch.Tensor, most_keys: int) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=query_ends,
        cu_seqlens_kv=key_ends,
        max_seqlen_q=most_queries,
        max_seqlen_kv=most_keys,
    )


def attend_with_shared_prompts(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: SharedPrompts,
) -> torch.Tensor:
    """[N, heads · D] from [N, heads or groups, D] by two calls of an attention over segments of varying length.

    The prompts are causal; the keys of a response are its prompt's and its own, so its causal mask is aligned at the
    bottom right. ``attend`` is TransformerEngine's as megatron-core wraps it. Padding of the row gets zeros.
    """
    prompts, end = segments.num_prompt_tokens, segments.num_prompt_tokens + segments.num_response_tokens
    ends, longest = segments.prompt_ends, int(segments.prompt_lengths.max())
    outputs = [
        attend(
            query[:prompts],
            key[:prompts],
            value[:prompts],
            attn_mask_type=AttnMaskType.causal,
            packed_seq_params=_thd(ends, longest, ends, longest),
        ).flatten(1)
    ]
    if end > prompts:
        outputs.append(
            attend(
                query[prompts:end],
                key.index_select(0, segments.response_keys),
                value.index_select(0, segments.response_keys),
                attn_mask_type=_PackedMask.padding_causal_bottom_right,
                packed_seq_params=_thd(
                    segments.response_ends,
                    int(segments.response_lengths.max()),
                    segments.key_ends,
                    int(segments.key_lengths.max()),
                ),
            ).flatten(1)
        )
    return torch.nn.functional.pad(torch.cat(outputs), (0, 0, 0, segments.num_padding))


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
