"""``scores`` in tiles of tokens × vocabulary, in plain torch: the logits of one tile are all that is ever in memory.

A forward pass keeps running sums per token (online softmax; Milakov & Gimelshein 2018, arXiv 1805.02867); the backward
pass computes each tile's logits again and adds up both gradients in float32. With T tokens, hidden size H and V
vocabulary rows on this rank: 2·T·H·V floating-point operations forward and 6·T·H·V backward.

Vocabulary-parallel: two collectives forward (a maximum [T] and one packed sum [3, T]; two more for the most probable
tokens, where asked), one backward (the sum of the hidden states' gradient).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from perl_megatron.kernels import tiles as sizes
from perl_megatron.kernels.scores import ScoreOptions, TokenScores, VocabularyShard
from perl_megatron.kernels.tiles import Tiles, add_product


def score_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions
) -> TokenScores:
    """See ``dispatch.score_tokens``."""
    return TokenScores(*_TiledScores.apply(hidden, weight, targets, shard, options))


@dataclass
class _Sums:
    """Of each token over the tiles so far; all [T]."""

    maximum: Tensor
    total: Tensor
    """Σ exp(z - maximum)."""
    weighted: Tensor
    """Σ exp(z - maximum) · (z - maximum)."""
    target: Tensor
    """z of the target, where it is on this rank; else 0."""

    @classmethod
    def none(cls, tiles: Tiles) -> _Sums:
        """Before the first tile."""
        return cls(tiles.lowest(), *(tiles.new_values(0) for _ in range(3)))


def _fold(sums: _Sums, tokens: slice, z: Tensor, scratch: Tensor, *, entropy: bool) -> None:
    """Add the tile's logits to the sums; destroys them."""
    maximum, total, weighted = sums.maximum[tokens], sums.total[tokens], sums.weighted[tokens]
    new = torch.maximum(maximum, z.amax(1))
    change = maximum - new
    decay = change.exp()
    z -= new[:, None]
    torch.exp(z, out=scratch)
    if entropy:
        weighted.addcmul_(total, change).mul_(decay)
        weighted += z.mul_(scratch).sum(1)
    total.mul_(decay).add_(scratch.sum(1))
    maximum.copy_(new)


class _TiledScores(torch.autograd.Function):
    @staticmethod
    @torch.no_grad()
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        options: ScoreOptions,
    ) -> tuple[Tensor, ...]:
        tiles = Tiles(hidden, weight, targets, shard, options)
        sums, top = _Sums.none(tiles), _Top(tiles, options.top_k)
        for rows, weight_tile in tiles.row_tiles():
            for tokens, tile in tiles.token_tiles():
                z, scratch = tiles.logits(tokens, tile, rows, weight_tile)
                here, column = tiles.targets_in(tokens, rows)
                sums.target[tokens] += torch.where(here, z.gather(1, column)[:, 0], 0)
                top.fold(tokens, z, rows)
                _fold(sums, tokens, z, scratch, entropy=options.entropy)
        _reduce(sums, shard.group)
        top.reduce(shard)
        log_total = sums.total.log()
        log_prob = torch.where(tiles.known, sums.target - sums.maximum - log_total, torch.nan)
        log_sum_exp = sums.maximum + log_total
        entropy = log_total - sums.weighted / sums.total if options.entropy else torch.zeros_like(log_prob)
        ctx.save_for_backward(hidden, weight, targets, sums.maximum, sums.total, entropy)
        ctx.shard, ctx.options = shard, options
        ctx.set_materialize_grads(False)
        values, ids = (torch.where(tiles.counts[:, None], each, 0) for each in top.result(log_sum_exp))
        is_top = (sums.target == sums.maximum) & tiles.counts & ~log_prob.isnan()
        log_prob, entropy, log_sum_exp = (torch.where(tiles.counts, x, 0) for x in (log_prob, entropy, log_sum_exp))
        ctx.mark_non_differentiable(log_sum_exp, is_top, values, ids)
        return log_prob, entropy, log_sum_exp, is_top, values, ids

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, maximum, total, entropy = ctx.saved_tensors
        if grad_log_prob is None and grad_entropy is None:
            return None, None, None, None, None
        tiles = Tiles(hidden, weight, targets, ctx.shard, ctx.options)
        grad_entropy = grad_entropy if ctx.options.entropy else None
        of_logits = _LogitsGradient(tiles, maximum, total, entropy, grad_log_prob, grad_entropy)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden, dtype=tiles.dtype) if need_hidden else None
        weight_gradient = _WeightGradient(weight, tiles.dtype, ctx.options.gradient_buffer) if need_weight else None
        for rows, weight_tile in tiles.row_tiles():
            part = weight_gradient.part(rows) if weight_gradient else None
            for tokens, tile in tiles.token_tiles():
                gradient = of_logits.tile(tokens, rows, *tiles.logits(tokens, tile, rows, weight_tile))
                gradient = gradient.to(tiles.operand_dtype)
                if hidden_gradient is not None:
                    add_product(hidden_gradient[tokens], gradient, weight_tile)
                if part is not None:
                    add_product(part, gradient.t(), tile[: len(gradient)])
            if weight_gradient is not None:
                weight_gradient.finish(rows)
        if hidden_gradient is not None:
            if ctx.shard.group is not None:
                dist.all_reduce(hidden_gradient, group=ctx.shard.group)
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, weight_gradient.result if weight_gradient else None, None, None, None


def _reduce(sums: _Sums, group: dist.ProcessGroup | None) -> None:
    """From this rank's rows to the whole vocabulary."""
    if group is None:
        return
    own = sums.maximum
    sums.maximum = own.clone()
    dist.all_reduce(sums.maximum, dist.ReduceOp.MAX, group=group)
    change = own - sums.maximum
    decay = change.exp()
    packed = torch.stack([sums.total * decay, (sums.weighted + sums.total * change) * decay, sums.target])
    dist.all_reduce(packed, group=group)
    sums.total, sums.weighted, sums.target = packed


class _LogitsGradient:
    """The gradient with respect to a tile's logits, before the temperature, from those of the results.

    Each tile is shifted by the maximum alone and divided by the sum afterwards, as in the forward pass: their rounded
    sum log Σ exp would be off by the same amount for the whole vocabulary, which logits of a common size multiply.
    """

    def __init__(
        self,
        tiles: Tiles,
        maximum: Tensor,
        total: Tensor,
        entropy: Tensor,
        grad_log_prob: Tensor | None,
        grad_entropy: Tensor | None,
    ):
        self._tiles, self._maximum = tiles, maximum
        self._by_log_prob = self._per_token(torch.zeros_like(entropy) if grad_log_prob is None else grad_log_prob)
        self._constant = self._by_log_prob
        self._by_entropy = None
        if grad_entropy is not None:
            by_entropy = self._per_token(grad_entropy)
            self._constant = self._by_log_prob + by_entropy * (entropy - total.log())
            self._by_entropy = by_entropy / total
        self._constant = self._constant / total

    def _per_token(self, gradient: Tensor) -> Tensor:
        """[T], zero where the target is ignored or unknown, and with respect to logits before the temperature."""
        gradient = torch.where(self._tiles.counts & self._tiles.known, gradient.to(self._tiles.dtype), 0)
        return gradient if self._tiles.scale is None else gradient * self._tiles.scale

    def tile(self, tokens: slice, rows: slice, z: Tensor, scratch: Tensor) -> Tensor:
        """[tokens, rows], in the place of z or the scratch."""
        z -= self._maximum[tokens, None]
        if self._by_entropy is None:
            gradient = z.exp_().mul_(-self._constant[tokens, None])
        else:
            torch.exp(z, out=scratch)
            z.mul_(self._by_entropy[tokens, None]).add_(self._constant[tokens, None])
            gradient = scratch.mul_(z).neg_()
        here, column = self._tiles.targets_in(tokens, rows)
        gradient.scatter_add_(1, column, torch.where(here, self._by_log_prob[tokens], 0)[:, None])
        return gradient


class _WeightGradient:
    """Where the gradient of a tile of the weight is added up, in float32, and where it goes from there."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, buffer: Tensor | None):
        self._target = torch.zeros_like(weight) if buffer is None else buffer
        self._adds = buffer is not None
        self._tile: Tensor | None = None
        if self._target.dtype != dtype:
            self._tile = weight.new_empty(min(sizes.ROWS, len(weight)), weight.shape[1], dtype=dtype)
        self.result = None if self._adds else self._target

    def part(self, rows: slice) -> Tensor:
        """Float32 [rows, H] to add to: the target itself where it is of that type."""
        target = self._target[rows]
        return target if self._tile is None else self._tile[: len(target)].zero_()

    def finish(self, rows: slice) -> None:
        """After the last token."""
        if self._tile is None:
            return
        target = self._target[rows]
        if self._adds:
            target += self._tile[: len(target)]
        else:
            target.copy_(self._tile[: len(target)])


class _Top:
    """The k most probable tokens so far: z and id, by descending z."""

    def __init__(self, tiles: Tiles, k: int):
        self._tiles, self._k = tiles, k
        self._values = tiles.lowest()[:, None].repeat(1, k)
        self._ids = torch.zeros_like(self._values, dtype=torch.int64)

    def fold(self, tokens: slice, z: Tensor, rows: slice) -> None:
        """Add a tile's logits."""
        if self._k:
            tile = z.topk(min(self._k, z.shape[1]), dim=1)
            ids = tile.indices + (self._tiles.shard.first + rows.start)
            self._merge(tokens, [self._values[tokens], tile.values], [self._ids[tokens], ids])

    def reduce(self, shard: VocabularyShard) -> None:
        """From this rank's rows to the whole vocabulary."""
        if self._k and shard.group is not None:
            values = [torch.empty_like(self._values) for _ in range(shard.group.size())]
            ids = [torch.empty_like(self._ids) for _ in range(shard.group.size())]
            dist.all_gather(values, self._values, group=shard.group)
            dist.all_gather(ids, self._ids, group=shard.group)
            self._merge(slice(None), values, ids)

    def _merge(self, tokens: slice, values: list[Tensor], ids: list[Tensor]) -> None:
        best = torch.cat(values, dim=1).topk(self._k, dim=1)
        self._values[tokens] = best.values
        self._ids[tokens] = torch.cat(ids, dim=1).gather(1, best.indices)

    def result(self, log_sum_exp: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities [T, k], ids [T, k])."""
        return self._values - log_sum_exp[:, None], self._ids
