"""megatron-core's configuration of the three parts: language model, vision tower, merger."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import gelu, silu

from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import Architecture
from perl_megatron.model.layer_specs import uses_transformer_engine
from perl_megatron.runtime import platform

_FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Recipe → compute capability from which Transformer Engine offers it (its ``check_fp8_support`` and like it)."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fuses_weight_gradients(*, cuda: bool, apex: bool, transformer_engine: bool, has_megatron_linear: bool) -> bool:
    """Whether weight gradients are added to their float32 buffers within the matrix product.

    TransformerEngine's layers bring the kernel; megatron-core's own use apex's, and refuse the setting without it. On
    the CPU ``runtime.megatron_cpu`` has one for them.
    ``has_megatron_linear``: the part has such a layer even among TransformerEngine's (the language model's output
    layer: it only holds its weight, but is built all the same).
    (Fused Adam needs no setting: megatron-core's optimizer/__init__.py imports TransformerEngine's, else apex's, else
    takes torch's.)
    """
    return not cuda or apex or (transformer_engine and not has_megatron_linear)


def _fused_weight_gradients(dtype: torch.dtype, *, has_megatron_linear: bool) -> bool:
    return fuses_weight_gradients(
        cuda=platform.is_cuda(),
        apex=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        transformer_engine=uses_transformer_engine(dtype),
        has_megatron_linear=has_megatron_linear,
    )


def _fp8(model: ModelConfig) -> dict[str, Any]:
    """Only for the language model: patches of images cannot be padded to the multiples of tokens that fp8 needs."""
    if model.fp8 == "none":
        return {}
    if not platform.is_cuda():
        raise UserError(
            "8-bit matrix products need CUDA, and this machine has no CUDA device",
            where=f"model.fp8 = {model.fp8}",
            fix="set model.fp8=none, or run where there is CUDA (perl-megatron doctor shows what is here)",
        )
    needed, found = _FP8_CAPABILITY[model.fp8_recipe], platform.compute_capability()
    if found < needed:
        raise UserError(
            f"the recipe needs a GPU of compute capability {needed[0]}.{needed[1]}, and this one's is "
            f"{found[0]}.{found[1]}",
            where=f"model.fp8 = {model.fp8}, model.fp8_recipe = {model.fp8_recipe}",
            fix="set model.fp8=none, or model.fp8_recipe=tensorwise (8.9 and later)",
        )
    return {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}


def _shared(model: ModelConfig, tensor_size: int, *, has_megatron_linear: bool = False) -> dict[str, Any]:
    dtype = _DTYPES[model.dtype]
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return {
        "tensor_model_parallel_size": tensor_size,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "perform_initialization": False,  # every weight is imported; stream.import_weights proves it
        "use_cpu_initialization": not platform.is_cuda(),
        "gradient_accumulation_fusion": _fused_weight_gradients(dtype, has_megatron_linear=has_megatron_linear),
        # The other fusions are torch.compile or CUDA kernels; TransformerEngine brings its own.
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
        "tp_comm_overlap": False,
        **recompute[model.recompute],
    }


def language_config(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """The language model: pipeline stages exchange activations of any length, sums of the loss stay per token."""
    dtype = _DTYPES[model.dtype]
    interleaved = parallel.virtual_pipeline > 1
    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_size,
        layernorm_epsilon=architecture.norm_epsilon,
        mrope_section=list(architecture.mrope_section),
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.context,
        pipeline_dtype=dtype,
        # Interleaved stages send both ways at once, and in one batch the messages of two stages to each other cross.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=parallel.sequence,
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # no experts here: the default's check refuses variable lengths
        calculate_per_token_loss=True,
        batch_p2p_sync=platform.is_cuda(),
        deallocate_pipeline_outputs=platform.is_cuda(),  # on gloo a buffer may still be in flight
        **_fp8(model),
        **_shared(model, parallel.tensor, has_megatron_linear=True),
    )
    refuse_silent_traps(config)
    return config


def refuse_silent_traps(config: TransformerConfig) -> None:
    """UserError for settings that megatron-core 0.16 accepts and with which it computes wrong gradients in silence."""
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    if interleaved and (config.batch_p2p_comm or not config.overlap_p2p_comm):
        raise UserError(
            "interleaved pipeline stages need overlapping messages outside a batch: in a batch, those between two "
            "stages cross",
            where="parallel.virtual_pipeline; megatron-core's overlap_p2p_comm, batch_p2p_comm",
            fix="overlap_p2p_comm=True, batch_p2p_comm=False",
        )
    if config.deallocate_pipeline_outputs and not platform.is_cuda():
        raise UserError(
            "on gloo a stage's output may still be in flight when its memory is released",
            where="parallel.pipeline; megatron-core's deallocate_pipeline_outputs",
            fix="deallocate_pipeline_outputs=False",
        )


def _vision_tensor_size(parallel: ParallelConfig) -> int:
    return parallel.tensor if parallel.vision == "sharded" else 1


def vision_config(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """The vision tower: all its blocks on the first pipeline stage, over heads or not at all, never over sequences."""
    vision = architecture.vision
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        ffn_hidden_size=vision.ffn_size,
        layernorm_epsilon=1e-6,  # fixed in the architecture
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=True,
        add_qkv_bias=True,
        **_shared(model, _vision_tensor_size(parallel)),
    )


def merger_config(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """The merger: a two-layer GELU network over a cell's patches."""
    vision = architecture.vision
    return TransformerConfig(
        num_layers=1,
        hidden_size=vision.out_hidden_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.head_dim,
        ffn_hidden_size=vision.hidden_size * vision.merge_size**2,
        gated_linear_unit=False,
        activation_func=gelu,
        add_bias_linear=True,
        **_shared(model, _vision_tensor_size(parallel)),
    )
