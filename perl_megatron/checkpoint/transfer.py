"""Parameters of a replica to all of its ranks: gathered over tensor-parallel ranks, sent to all pipeline stages.

Consecutive parameters make a part, and three parts are in flight, each in one phase: being gathered, being sent, being
used. A part has half of ``bucket_bytes``, so that with the copies that a user makes of single tensors two buckets are
enough. Each parameter is a collective of its own; those of a group are started in the same order on all of its ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from perl_megatron.checkpoint.qwen25_vl_table import Entry
from perl_megatron.runtime.topology import Topology

BUCKET_BYTES = 1 << 30
"""What a bucket holds, unless something else is asked for."""


@dataclass(frozen=True)
class Shard:
    """Where and what a parameter's shard is; the same on all tensor-parallel ranks."""

    stage: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of one rank's."""
        return self.shape.numel() * self.dtype.itemsize


def transferred(
    entries: Sequence[Entry],
    local: Mapping[str, Tensor],
    shards: Mapping[str, Shard],
    topology: Topology,
    bucket_bytes: int,
) -> Iterator[tuple[Entry, Tensor]]:
    """(entry, [ranks, *shape] with the shards of all tensor-parallel ranks in rank order) of each entry, in order.

    [1, *shape] where the parameter is replicated. ``local`` has this rank's, which may be what is given.
    """
    in_flight: deque[_Part] = deque()
    for entries_of_part in cut(entries, shards, topology.tensor_size, bucket_bytes // 2):
        in_flight.append(_Part(entries_of_part, local, shards, topology))
        if len(in_flight) > 1:
            in_flight[-2].send()
        if len(in_flight) > 2:
            yield from in_flight.popleft().wait()
    while in_flight:
        in_flight[-1].send()
        yield from in_flight.popleft().wait()


def cut(entries: Iterable[Entry], shards: Mapping[str, Shard], ranks: int, num_bytes: int) -> Iterator[list[Entry]]:
    """Consecutive entries of at most ``num_bytes`` together, all ranks' shards counted; a larger one goes alone."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        added = shards[entry.megatron].nbytes * (ranks if entry.op.sharded else 1)
        if part and size + added > num_bytes:
            yield part
            part, size = [], 0
        part.append(entry)
        size += added
    if part:
        yield part


class _Part:
    """Some entries on their way: gathered from the start, then sent, then waited for."""

    def __init__(
        self, entries: Sequence[Entry], local: Mapping[str, Tensor], shards: Mapping[str, Shard], topology: Topology
    ):
        self._entries, self._shards, self._topology = entries, shards, topology
        self._works: list[Any] = []
        self._is_sent = False
        self._gathered = [self._gather(entry, local) for entry in entries]

    def _gather(self, entry: Entry, local: Mapping[str, Tensor]) -> Tensor:
        shard, topology = self._shards[entry.megatron], self._topology
        is_own = shard.stage == topology.pipeline_rank
        count = topology.tensor_size if entry.op.sharded else 1
        if is_own and count == 1:
            return local[entry.megatron].contiguous().unsqueeze(0)
        device = next(iter(local.values())).device
        gathered = torch.empty((count, *shard.shape), dtype=shard.dtype, device=device)
        if is_own:
            mine = local[entry.megatron].contiguous()
            group = topology.tensor_group()
            # Not `all_gather`, which gathers into memory of its own and copies from there.
            self._works.append(dist.all_gather_into_tensor(gathered.flatten(0, 1), mine, group=group, async_op=True))
        return gathered

    def send(self) -> None:
        """To the other pipeline stages."""
        if self._is_sent or self._topology.pipeline_size == 1:
            return
        self._finish()
        group = self._topology.pipeline_group()
        for entry, gathered in zip(self._entries, self._gathered, strict=True):
            source = self._shards[entry.megatron].stage
            self._works.append(dist.broadcast(gathered, group=group, group_src=source, async_op=True))
        self._is_sent = True

    def wait(self) -> Iterator[tuple[Entry, Tensor]]:
        """Each entry with its numbers, which are let go of one after another."""
        self._finish()
        self._gathered.reverse()
        for entry in self._entries:
            yield entry, self._gathered.pop()

    def _finish(self) -> None:
        for work in self._works:
            work.wait()
        self._works = []
