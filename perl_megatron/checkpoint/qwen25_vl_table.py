"""The one mapping between published Qwen2.5-VL tensors and Megatron's parameters. Data; ``stream`` moves the tensors.

Published names: ``model.layers.*``, ``model.embed_tokens.weight``, ``model.norm.weight``, ``visual.*`` and, where the
embedding is not tied, ``lm_head.weight``. Megatron's are a whole model's: layer numbers count over all stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from perl_megatron.checkpoint.ops import (
    Column,
    FlattenedKernel,
    GateUp,
    GroupedQkv,
    Op,
    Replicated,
    Row,
    StackedQkv,
    Vocabulary,
    Whole,
)
from perl_megatron.model.architecture import Architecture

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_LAYER = "lm_head.weight"
"""Absent where the embeddings are tied; some checkpoints hold a copy of the embedding under this name all the same."""


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the published tensors that make it up."""

    megatron: str
    published: tuple[str, ...]
    op: Op


def table(architecture: Architecture, *, whole_vision: bool = False) -> list[Entry]:
    """Every parameter of the whole model, in the order in which the stream carries them.

    ``whole_vision``: for a layout in which every tensor-parallel rank holds all of the vision tower and the merger.
    """
    vision = _vision_entries(architecture)
    if whole_vision:
        vision = [replace(entry, op=Whole(entry.op)) for entry in vision]
    entries = [*vision, *_language_entries(architecture)]
    published = [name for entry in entries for name in entry.published]
    assert len(set(published)) == len(published)
    assert len({entry.megatron for entry in entries}) == len(entries)
    return entries


def _language_entries(architecture: Architecture) -> list[Entry]:
    vocabulary = Vocabulary(architecture.vocabulary_size)
    qkv = GroupedQkv(architecture.num_heads, architecture.num_kv_heads, architecture.head_dim)
    entries = [
        Entry("language_model.embedding.word_embeddings.weight", (EMBEDDING,), vocabulary),
    ]
    for layer in range(architecture.num_layers):
        ours, theirs = f"language_model.decoder.layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        entries += [
            Entry(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), Replicated()),
            *(
                Entry(
                    f"{ours}.self_attention.linear_qkv.{kind}",
                    (f"{attention}.q_proj.{kind}", f"{attention}.k_proj.{kind}", f"{attention}.v_proj.{kind}"),
                    qkv,
                )
                for kind in ("weight", "bias")
            ),
            Entry(f"{ours}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), Row()),
            Entry(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), Replicated()),
            Entry(f"{ours}.mlp.linear_fc1.weight", (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"), GateUp()),
            Entry(f"{ours}.mlp.linear_fc2.weight", (f"{mlp}.down_proj.weight",), Row()),
        ]
    entries.append(Entry("language_model.decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()))
    if not architecture.tied_embeddings:
        entries.append(Entry("language_model.output_layer.weight", (OUTPUT_LAYER,), vocabulary))
    return entries


def _vision_entries(architecture: Architecture) -> list[Entry]:
    vision = architecture.vision
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    qkv = StackedQkv(vision.num_heads)
    entries = [Entry("vision_model.patch_embed.weight", ("visual.patch_embed.proj.weight",), FlattenedKernel(kernel))]
    for block in range(vision.depth):
        ours, theirs = f"vision_model.decoder.layers.{block}", f"visual.blocks.{block}"
        entries += [
            Entry(f"{ours}.input_layernorm.weight", (f"{theirs}.norm1.weight",), Replicated()),
            Entry(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.norm2.weight",), Replicated()),
        ]
        for kind, row in (("weight", Row()), ("bias", Replicated())):
            gate_up = (f"{theirs}.mlp.gate_proj.{kind}", f"{theirs}.mlp.up_proj.{kind}")
            entries += [
                Entry(f"{ours}.self_attention.linear_qkv.{kind}", (f"{theirs}.attn.qkv.{kind}",), qkv),
                Entry(f"{ours}.self_attention.linear_proj.{kind}", (f"{theirs}.attn.proj.{kind}",), row),
                Entry(f"{ours}.mlp.linear_fc1.{kind}", gate_up, GateUp()),
                Entry(f"{ours}.mlp.linear_fc2.{kind}", (f"{theirs}.mlp.down_proj.{kind}",), row),
            ]
    entries.append(Entry("vision_model.decoder.final_layernorm.weight", ("visual.merger.ln_q.weight",), Replicated()))
    for kind, row in (("weight", Row()), ("bias", Replicated())):
        encoder = "vision_model.projection.encoder"
        entries += [
            Entry(f"{encoder}.linear_fc1.{kind}", (f"visual.merger.mlp.0.{kind}",), Column()),
            Entry(f"{encoder}.linear_fc2.{kind}", (f"visual.merger.mlp.2.{kind}",), row),
        ]
    return entries


TIED_COPY = "language_model.output_layer.weight"
"""With tied embeddings and several stages, the last stage holds a second copy of the embedding under this name."""

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def canonical_megatron_name(name: str) -> str:
    """The table's name of a parameter: TransformerEngine's fused layers hold the norm before them under their own."""
    for fused, plain in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def fused_megatron_name(name: str) -> str:
    """The inverse of ``canonical_megatron_name``, for the norms of layers: checkpoints are written with these names."""
    for fused, plain in _FUSED_NORMS.items():
        if name.endswith(f".{plain}"):
            return name.removesuffix(plain) + fused
    return name


def published_name(name: str) -> str:
    """The published name of a tensor that may be named as transformers 5 names it in memory."""
    for in_memory, published in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(in_memory):
            return published + name.removeprefix(in_memory)
    return name
