"""How a Megatron parameter is made of published tensors, and cut over tensor-parallel ranks. Pure tensor functions.

``split`` takes the published tensors of one parameter and gives one rank's shard; ``join`` takes all ranks' shards and
gives the published tensors back: ``join([split(parts, rank, size) for rank in range(size)]) == parts``, bit for bit.
Both may return views of their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from perl_megatron.errors import UserError

Parts = tuple[torch.Tensor, ...]


class Op(Protocol):
    """A layout."""

    sharded: bool
    """Whether tensor-parallel ranks hold different shards; else all hold the whole."""

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """Shard ``rank`` of ``size`` of the published tensors."""
        ...

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """The published tensors of all shards (of one shard, if not ``sharded``)."""
        ...


def _chunk(tensor: torch.Tensor, rank: int, size: int, dim: int) -> torch.Tensor:
    if tensor.shape[dim] % size:
        raise UserError(f"a dimension of {tensor.shape[dim]} does not split into {size} tensor-parallel parts")
    return tensor.chunk(size, dim)[rank]


def _join(shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(tuple(shards), dim)  # cat copies even a single tensor


@dataclass(frozen=True)
class Replicated:
    """The whole tensor on every rank."""

    sharded = False

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """The tensor itself."""
        return parts[0]

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """The tensor itself."""
        return (shards[0],)


@dataclass(frozen=True)
class FlattenedKernel:
    """A convolution kernel [out, *kernel] held by every rank as the matrix [out, product of kernel]."""

    kernel: tuple[int, ...]
    sharded = False

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """The matrix."""
        return parts[0].flatten(1)

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """The kernel."""
        return (shards[0].unflatten(1, self.kernel),)


@dataclass(frozen=True)
class Column:
    """Cut over output features (dimension 0): column-parallel weights and biases."""

    sharded = True

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """This rank's rows."""
        return _chunk(parts[0], rank, size, 0)

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """All rows."""
        return (_join(shards, 0),)


@dataclass(frozen=True)
class Row:
    """Cut over input features (dimension 1): row-parallel weights."""

    sharded = True

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """This rank's columns."""
        return _chunk(parts[0], rank, size, 1)

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """All columns."""
        return (_join(shards, 1),)


@dataclass(frozen=True)
class Vocabulary:
    """Cut over the vocabulary (dimension 0), which zeros fill up to a multiple of the ranks."""

    rows: int
    """The published vocabulary size."""
    sharded = True

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """This rank's rows, zeros beyond the vocabulary."""
        per_rank = -(-self.rows // size)
        own = parts[0][rank * per_rank : (rank + 1) * per_rank]
        missing = per_rank - own.shape[0]
        return torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """The real rows."""
        return (_join(shards, 0)[: self.rows],)


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections; each rank holds its rows of the gate, then its rows of the up projection."""

    sharded = True

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """[gate rows of the rank; up rows of the rank]."""
        return torch.cat([_chunk(part, rank, size, 0) for part in parts], 0)

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """(gate, up)."""
        halves = [shard.chunk(2, 0) for shard in shards]
        return _join([gate for gate, _ in halves], 0), _join([up for _, up in halves], 0)


@dataclass(frozen=True)
class Whole:
    """Another layout of which every tensor-parallel rank holds all: a replicated vision tower's."""

    op: Op
    sharded = False

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """As for one rank."""
        return self.op.split(parts, 0, 1)

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """Of one rank's."""
        return self.op.join(shards)


@dataclass(frozen=True)
class GroupedQkv:
    """Query, key and value, published apart; Megatron interleaves them by group: its queries, its key, its value.

    Weights [heads · D, in] and biases [heads · D] alike.
    """

    num_heads: int
    num_groups: int
    head_dim: int
    sharded = True

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """The rank's groups."""
        grouped = torch.cat([part.unflatten(0, (self.num_groups, -1)) for part in parts], dim=1)
        return _chunk(grouped, rank, size, 0).flatten(0, 1)

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """(query, key, value)."""
        grouped = _join(shards, 0).unflatten(0, (self.num_groups, -1))
        queries = self.num_heads // self.num_groups * self.head_dim
        pieces = grouped.split([queries, self.head_dim, self.head_dim], dim=1)
        return tuple(piece.flatten(0, 1) for piece in pieces)


@dataclass(frozen=True)
class StackedQkv:
    """Query, key and value published as one tensor [3 · heads · D, …]; Megatron interleaves them by head."""

    num_heads: int
    sharded = True

    def split(self, parts: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """The rank's heads."""
        by_head = parts[0].unflatten(0, (3, self.num_heads, -1)).transpose(0, 1)
        return _chunk(by_head, rank, size, 0).flatten(0, 2)

    def join(self, shards: Sequence[torch.Tensor]) -> Parts:
        """The stacked tensor."""
        by_head = _join(shards, 0).unflatten(0, (self.num_heads, 3, -1))
        return (by_head.transpose(0, 1).flatten(0, 2),)
