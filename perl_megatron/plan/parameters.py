"""Every parameter of a rank's model chunks: name, part and how many numbers. Exact; no torch.

A rank's parameters depend on its pipeline stage and on the tensor-parallel size only: all tensor-parallel ranks of a
stage hold equally many. Names are those of ``Policy.named_parameters`` with megatron-core's own layers, where layers
count from 0 in each chunk. H, F, Q, K: hidden size, feed-forward size, widths of queries and of keys of the language
model; D, E: hidden and feed-forward size of the vision tower; t: tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.layout import stage_layers
from perl_megatron.config.schema import OptimizerSection, ParallelConfig

Part = Literal["vision", "merger", "language"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank."""

    name: str
    part: Part
    """Which of the parts that can be frozen (``train/parts.py``)."""
    count: int
    """Numbers in it, on this rank."""
    is_shared_embedding: bool = False
    """One of the two copies of a tied embedding, on the first and the last of several stages."""


def trained_parts(optimizer: OptimizerSection) -> set[Part]:
    """The parts that are not frozen."""
    factors: dict[Part, float] = {
        "vision": optimizer.vision_multiplier,
        "merger": optimizer.merger_multiplier,
        "language": optimizer.language_multiplier,
    }
    return {part for part, factor in factors.items() if factor > 0}


@lru_cache(maxsize=4096)
def chunk_parameters(
    numbers: ArchitectureNumbers, parallel: ParallelConfig, stage: int, chunk: int = 0
) -> tuple[Parameter, ...]:
    """All parameters of a model chunk of a stage, in the order of ``named_parameters``."""
    is_first = stage == 0 and chunk == 0
    is_last = stage == parallel.pipeline - 1 and chunk == parallel.virtual_pipeline - 1
    layers = stage_layers(parallel, numbers.num_layers)[stage] // parallel.virtual_pipeline
    found: list[Parameter] = []
    if is_first:
        found += _vision(numbers, parallel.tensor if parallel.vision == "sharded" else 1)
    found += _language(numbers, parallel.tensor, layers, is_first=is_first, is_last=is_last)
    return tuple(found)


def stage_parameters(numbers: ArchitectureNumbers, parallel: ParallelConfig, stage: int) -> tuple[Parameter, ...]:
    """All parameters of a rank of a stage, chunk after chunk."""
    chunks = range(parallel.virtual_pipeline)
    return tuple(one for chunk in chunks for one in chunk_parameters(numbers, parallel, stage, chunk))


def count(parameters: tuple[Parameter, ...], parts: set[Part] | None = None) -> int:
    """Numbers in all of them, or in those of some parts."""
    return sum(one.count for one in parameters if parts is None or one.part in parts)


@lru_cache(maxsize=64)
def total_count(numbers: ArchitectureNumbers) -> int:
    """Numbers in the whole model, which is what is published."""
    return count(chunk_parameters(numbers, ParallelConfig(), 0))


@lru_cache(maxsize=64)
def decoded_count(numbers: ArchitectureNumbers) -> int:
    """Numbers that a token is multiplied by when it is decoded.

    The language part, of which an input embedding that is not the output layer too gives a row only.
    """
    whole = chunk_parameters(numbers, ParallelConfig(), 0)
    lookup = 0 if numbers.tied_embeddings else numbers.vocabulary_size * numbers.hidden_size
    return count(whole, {"language"}) - lookup


def padded_vocabulary(numbers: ArchitectureNumbers, tensor: int) -> int:
    """The vocabulary filled up to a multiple of the tensor-parallel size."""
    return -(-numbers.vocabulary_size // tensor) * tensor


def _language(
    numbers: ArchitectureNumbers, tensor: int, layers: int, *, is_first: bool, is_last: bool
) -> Iterator[Parameter]:
    hidden, ffn = numbers.hidden_size, numbers.ffn_size
    query, key = numbers.num_heads * numbers.head_dim, numbers.num_kv_heads * numbers.head_dim
    vocabulary = padded_vocabulary(numbers, tensor) // tensor * hidden
    copied = numbers.tied_embeddings and is_first != is_last
    prefix = "language_model"
    if is_first:
        yield Parameter(f"{prefix}.embedding.word_embeddings.weight", "language", vocabulary, copied)
    sizes = {
        "input_layernorm.weight": hidden,
        "self_attention.linear_proj.weight": query * hidden // tensor,
        "self_attention.linear_qkv.weight": (query + 2 * key) * hidden // tensor,
        "self_attention.linear_qkv.bias": (query + 2 * key) // tensor,
        "pre_mlp_layernorm.weight": hidden,
        "mlp.linear_fc1.weight": 2 * ffn * hidden // tensor,
        "mlp.linear_fc2.weight": ffn * hidden // tensor,
    }
    for layer in range(layers):
        for name, size in sizes.items():
            yield Parameter(f"{prefix}.decoder.layers.{layer}.{name}", "language", size)
    if is_last:
        yield Parameter(f"{prefix}.decoder.final_layernorm.weight", "language", hidden)
        if copied or not numbers.tied_embeddings:
            yield Parameter(f"{prefix}.output_layer.weight", "language", vocabulary, copied)


def _vision(numbers: ArchitectureNumbers, tensor: int) -> Iterator[Parameter]:
    width, ffn = numbers.vision_hidden_size, numbers.vision_ffn_size
    cell = width * numbers.vision_merge_size**2
    prefix = "vision_model"
    yield Parameter(f"{prefix}.patch_embed.weight", "vision", numbers.vision_patch_values * width)
    sizes = {
        "input_layernorm.weight": width,
        "self_attention.linear_proj.weight": width * width // tensor,
        "self_attention.linear_proj.bias": width,
        "self_attention.linear_qkv.weight": 3 * width * width // tensor,
        "self_attention.linear_qkv.bias": 3 * width // tensor,
        "pre_mlp_layernorm.weight": width,
        "mlp.linear_fc1.weight": 2 * ffn * width // tensor,
        "mlp.linear_fc1.bias": 2 * ffn // tensor,
        "mlp.linear_fc2.weight": ffn * width // tensor,
        "mlp.linear_fc2.bias": width,
    }
    for block in range(numbers.vision_depth):
        for name, size in sizes.items():
            yield Parameter(f"{prefix}.decoder.layers.{block}.{name}", "vision", size)
    out = numbers.vision_out_hidden_size
    merger = {
        "decoder.final_layernorm.weight": width,
        "projection.encoder.linear_fc1.weight": cell * cell // tensor,
        "projection.encoder.linear_fc1.bias": cell // tensor,
        "projection.encoder.linear_fc2.weight": out * cell // tensor,
        "projection.encoder.linear_fc2.bias": out,
    }
    for name, size in merger.items():
        yield Parameter(f"{prefix}.{name}", "merger", size)
