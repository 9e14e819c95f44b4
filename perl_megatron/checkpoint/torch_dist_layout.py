"""Where megatron-core's torch_dist format keeps each Megatron parameter, and how a layout cuts it. Pure; no files.

The layers of a stack are one global tensor with a leading axis [number of layers], under a key without the layer's
number. Norms have TransformerEngine's fused names, whichever layers wrote them. A chunk is one layer's shard of one
tensor-parallel rank; the gate and the up projection are chunks of their own, one after the other along the rows.
Any layout loads any chunks; a rank reads whole chunks where they were cut for its layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from perl_megatron.checkpoint.ops import GateUp, Row
from perl_megatron.checkpoint.qwen25_vl_table import Entry, fused_megatron_name
from perl_megatron.model.architecture import Architecture

_LAYER = re.compile(r"(.+\.decoder\.layers)\.(\d+)\.(.+)")
_WITH_EXTRA_STATE = ("linear_proj", "linear_qkv", "linear_fc1", "linear_fc2")
"""Layers for which megatron-core asks for ``_extra_state`` (TransformerEngine's fp8 scales; empty elsewhere)."""


@dataclass(frozen=True)
class Place:
    """One Megatron parameter in the checkpoint."""

    key: str
    layer: int | None
    """Its index on the leading axis; None where there is no such axis."""
    num_layers: int | None
    """Length of that axis."""

    def global_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The key's shape where one parameter has ``shape``."""
        return tuple(shape) if self.num_layers is None else (self.num_layers, *shape)

    def offsets(self, offsets: Sequence[int]) -> tuple[int, ...]:
        """Offsets within the parameter → within the key's tensor."""
        return tuple(offsets) if self.layer is None else (self.layer, *offsets)

    def chunk_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """As a chunk of the key's tensor."""
        return tuple(shape) if self.layer is None else (1, *shape)


def place(megatron_name: str, architecture: Architecture) -> Place:
    """Where the parameter of the table's name is."""
    match = _LAYER.fullmatch(fused_megatron_name(megatron_name))
    if match is None:
        return Place(megatron_name, None, None)
    is_vision = match[1].startswith("vision_model.")
    num_layers = architecture.vision.depth if is_vision else architecture.num_layers
    return Place(f"{match[1]}.{match[3]}", int(match[2]), num_layers)


def parameter_shape(entry: Entry, parts: Sequence[torch.Tensor], tensor_size: int) -> tuple[int, ...]:
    """Shape of the whole parameter, all ranks' shards together; ``parts`` are its published tensors (or meta ones)."""
    shard = list(entry.op.split(parts, 0, tensor_size).shape)
    if entry.op.sharded:
        shard[_cut_dimension(entry)] *= tensor_size
    return tuple(shard)


def chunks(
    entry: Entry, parts: Sequence[torch.Tensor], rank: int, tensor_size: int
) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """(offsets within the whole parameter, values) of one tensor-parallel rank; may be views of ``parts``.

    What is not sharded is rank 0's.
    """
    if not entry.op.sharded:
        whole = entry.op.split(parts, 0, 1)
        return [((0,) * whole.dim(), whole)] if rank == 0 else []
    dimension = _cut_dimension(entry)
    if isinstance(entry.op, GateUp):
        pieces = [part.chunk(tensor_size, 0)[rank] for part in parts]
        starts = [half * parts[0].shape[0] + rank * piece.shape[0] for half, piece in enumerate(pieces)]
    else:
        pieces = [entry.op.split(parts, rank, tensor_size)]
        starts = [rank * pieces[0].shape[dimension]]
    zeros = [0] * pieces[0].dim()
    return [
        ((*zeros[:dimension], start, *zeros[dimension + 1 :]), piece)
        for start, piece in zip(starts, pieces, strict=True)
    ]


def extra_state_keys(entry: Entry, architecture: Architecture) -> list[str]:
    """The keys of the empty ``_extra_state`` objects that belong to the layer of this weight."""
    layer_name, _, kind = entry.megatron.rpartition(".")
    if kind != "weight" or not layer_name.endswith(_WITH_EXTRA_STATE):
        return []
    where = place(layer_name, architecture)
    index, count = (0, 1) if where.layer is None else (where.layer, where.num_layers)
    return [f"{where.key}._extra_state/shard_{index}_{count}"]


def _cut_dimension(entry: Entry) -> int:
    return 1 if isinstance(entry.op, Row) else 0
