"""The shapes of a Qwen2.5-VL's published tensors and of the Megatron parameters they make up, without any weights."""

from __future__ import annotations

import re

import torch

from perl_megatron.checkpoint.qwen25_vl_table import table
from perl_megatron.model.architecture import Architecture

Shape = tuple[int, ...]


def published_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Every published tensor, in the table's order, with its shape."""
    shapes = _language_shapes(architecture) | _vision_shapes(architecture)
    return {name: shapes[_NUMBER.sub("", name)] for entry in table(architecture) for name in entry.published}


def megatron_shapes(architecture: Architecture, tensor_size: int = 1) -> dict[str, Shape]:
    """Every parameter of the whole model with the shape that one of ``tensor_size`` tensor-parallel ranks holds.

    Raises UserError where a dimension does not split.
    """
    published = published_shapes(architecture)
    shapes = {}
    for entry in table(architecture):
        parts = [torch.empty(published[name], device="meta") for name in entry.published]
        shapes[entry.megatron] = tuple(entry.op.split(parts, 0, tensor_size).shape)
    return shapes


_NUMBER = re.compile(r"(?<=^model\.layers\.)\d+\.|(?<=^visual\.blocks\.)\d+\.")
"""Which layer: they are all alike."""


def _language_shapes(architecture: Architecture) -> dict[str, Shape]:
    hidden, ffn, vocabulary = architecture.hidden_size, architecture.ffn_size, architecture.vocabulary_size
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        **{f"model.layers.{name}": shape for name, shape in layer.items()},
    }


def _vision_shapes(architecture: Architecture) -> dict[str, Shape]:
    vision = architecture.vision
    hidden, ffn = vision.hidden_size, vision.ffn_size
    cell = hidden * vision.merge_size**2
    block = {
        "norm1.weight": (hidden,),
        "norm2.weight": (hidden,),
        "attn.qkv.weight": (3 * hidden, hidden),
        "attn.qkv.bias": (3 * hidden,),
        "attn.proj.weight": (hidden, hidden),
        "attn.proj.bias": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.gate_proj.bias": (ffn,),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.up_proj.bias": (ffn,),
        "mlp.down_proj.weight": (hidden, ffn),
        "mlp.down_proj.bias": (hidden,),
    }
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return {
        "visual.patch_embed.proj.weight": (hidden, *kernel),
        "visual.merger.ln_q.weight": (hidden,),
        "visual.merger.mlp.0.weight": (cell, cell),
        "visual.merger.mlp.0.bias": (cell,),
        "visual.merger.mlp.2.weight": (vision.out_hidden_size, cell),
        "visual.merger.mlp.2.bias": (vision.out_hidden_size,),
        **{f"visual.blocks.{name}": shape for name, shape in block.items()},
    }
