"""What is kept of each token while its logits pass by in tiles: sums for softmax, and the most probable tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from perl_megatron.kernels.scores import VocabularyShard
from perl_megatron.kernels.tiles import Tiles


@dataclass
class Sums:
    """Of each token over the tiles so far; all [T] (online softmax; Milakov & Gimelshein 2018, arXiv 1805.02867)."""

    maximum: Tensor
    total: Tensor
    """Σ exp(z - maximum)."""
    weighted: Tensor
    """Σ exp(z - maximum) · (z - maximum)."""
    target: Tensor
    """z of the target, where it is on this rank; else 0."""

    @classmethod
    def none(cls, tiles: Tiles) -> Sums:
        """Before the first tile."""
        return cls(tiles.lowest(), *(tiles.new_values(0) for _ in range(3)))

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """From this rank's rows to the whole vocabulary, by two collectives."""
        if group is None:
            return
        own = self.maximum
        self.maximum = own.clone()
        dist.all_reduce(self.maximum, dist.ReduceOp.MAX, group=group)
        change = own - self.maximum
        decay = change.exp()
        packed = torch.stack([self.total * decay, (self.weighted + self.total * change) * decay, self.target])
        dist.all_reduce(packed, group=group)
        self.total, self.weighted, self.target = packed


class Top:
    """The k most probable tokens so far: z and id, by descending z."""

    def __init__(self, tiles: Tiles, k: int):
        self._tiles, self.k = tiles, k
        self._values = tiles.lowest()[:, None].repeat(1, k)
        self._ids = torch.zeros_like(self._values, dtype=torch.int64)

    def fold(self, tokens: slice, z: Tensor, rows: slice) -> None:
        """Add a tile's logits."""
        if self.k:
            tile = z.topk(min(self.k, z.shape[1]), dim=1)
            ids = tile.indices + (self._tiles.shard.first + rows.start)
            self._merge(tokens, [self._values[tokens], tile.values], [self._ids[tokens], ids])

    def reduce(self, shard: VocabularyShard) -> None:
        """From this rank's rows to the whole vocabulary."""
        if self.k and shard.group is not None:
            values = [torch.empty_like(self._values) for _ in range(shard.group.size())]
            ids = [torch.empty_like(self._ids) for _ in range(shard.group.size())]
            dist.all_gather(values, self._values, group=shard.group)
            dist.all_gather(ids, self._ids, group=shard.group)
            self._merge(slice(None), values, ids)

    def _merge(self, tokens: slice, values: list[Tensor], ids: list[Tensor]) -> None:
        best = torch.cat(values, dim=1).topk(self.k, dim=1)
        self._values[tokens] = best.values
        self._ids[tokens] = torch.cat(ids, dim=1).gather(1, best.indices)

    def result(self, log_sum_exp: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities [T, k], ids [T, k])."""
        return self._values - log_sum_exp[:, None], self._ids
