"""The autograd function of all backends that see the logits in tiles; how they go over a tile is theirs.

A forward pass keeps running sums per token (``sums.Sums``); the backward pass computes each tile's logits again and
adds up both gradients in float32. With T tokens, hidden size H and V vocabulary rows on this rank: 2·T·H·V
floating-point operations forward and 6·T·H·V backward.

Vocabulary-parallel: two collectives forward (a maximum [T] and one packed sum [3, T]; two more for the most probable
tokens, where asked), one backward (the sum of the hidden states' gradient).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from perl_megatron.kernels.scores import ScoreOptions, TokenScores, VocabularyShard
from perl_megatron.kernels.sums import Sums, Top
from perl_megatron.kernels.tiles import Tiles, add_product, multiply

TilesOf = TypeVar("TilesOf", bound=Tiles)


class TilePasses(Protocol[TilesOf]):
    """A backend, with its kind of tiles."""

    def make_tiles(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions
    ) -> TilesOf:
        """In the sizes that suit this backend."""

    def add_up(self, tiles: TilesOf, top: Top, *, entropy: bool) -> Sums:
        """Forward, over this rank's rows; without ``entropy``, ``Sums.weighted`` is not needed."""

    def logits_gradient(
        self, tiles: TilesOf, coefficients: Coefficients, tokens: slice, tile: Tensor, rows: slice, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of one tile [tokens, rows] and transposed, in ``tiles.operand_dtype``; valid until the next one."""


@dataclass(frozen=True)
class Coefficients:
    """The gradient with respect to the logits before the temperature; per token, all [T].

        -exp(z_v - maximum) · (constant + by_entropy · (z_v - maximum)) + [v = target] · by_log_prob

    Each tile is shifted by the maximum alone and divided by the sum (within the coefficients), as in the forward pass:
    their rounded sum log Σ exp would be off by the same amount for the whole vocabulary, which logits of a common size
    multiply. Zero where the target is ignored or unknown.
    """

    maximum: Tensor
    by_log_prob: Tensor
    constant: Tensor
    by_entropy: Tensor | None

    @classmethod
    def make(
        cls,
        tiles: Tiles,
        maximum: Tensor,
        total: Tensor,
        entropy: Tensor,
        grad_log_prob: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> Coefficients:
        """From the sums of the forward pass and the gradients of its results."""

        def per_token(gradient: Tensor) -> Tensor:
            gradient = torch.where(tiles.counts & tiles.known, gradient.to(tiles.dtype), 0)
            return gradient if tiles.scale is None else gradient * tiles.scale

        by_log_prob = per_token(torch.zeros_like(entropy) if grad_log_prob is None else grad_log_prob)
        if grad_entropy is None:
            return cls(maximum, by_log_prob, by_log_prob / total, None)
        by_entropy = per_token(grad_entropy)
        constant = by_log_prob + by_entropy * (entropy - total.log())
        return cls(maximum, by_log_prob, constant / total, by_entropy / total)


def score_tokens(
    passes: TilePasses[Any],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    options: ScoreOptions,
) -> TokenScores:
    """See ``dispatch.score_tokens``."""
    return TokenScores(*_FusedScores.apply(passes, hidden, weight, targets, shard, options))


class _FusedScores(torch.autograd.Function):
    @staticmethod
    @torch.no_grad()
    def forward(
        ctx: Any,
        passes: TilePasses[Any],
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        options: ScoreOptions,
    ) -> tuple[Tensor, ...]:
        tiles = passes.make_tiles(hidden, weight, targets, shard, options)
        top = Top(tiles, options.top_k)
        sums = passes.add_up(tiles, top, entropy=options.entropy)
        sums.reduce(shard.group)
        top.reduce(shard)
        log_total = sums.total.log()
        log_prob = torch.where(tiles.known, sums.target - sums.maximum - log_total, torch.nan)
        log_sum_exp = sums.maximum + log_total
        entropy = log_total - sums.weighted / sums.total if options.entropy else torch.zeros_like(log_prob)
        ctx.save_for_backward(hidden, weight, targets, sums.maximum, sums.total, entropy)
        ctx.passes, ctx.shard, ctx.options = passes, shard, options
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
            return (None,) * 6
        tiles = ctx.passes.make_tiles(hidden, weight, targets, ctx.shard, ctx.options)
        grad_entropy = grad_entropy if ctx.options.entropy else None
        coefficients = Coefficients.make(tiles, maximum, total, entropy, grad_log_prob, grad_entropy)
        need_hidden, need_weight = ctx.needs_input_grad[1:3]
        hidden_gradient = torch.zeros(hidden.shape, dtype=tiles.dtype, device=hidden.device) if need_hidden else None
        weight_gradient = _WeightGradient(weight, tiles, ctx.options.gradient_buffer) if need_weight else None
        for rows, weight_tile in tiles.row_tiles():
            for tokens, tile in tiles.token_tiles():
                gradient, transposed = ctx.passes.logits_gradient(tiles, coefficients, tokens, tile, rows, weight_tile)
                if hidden_gradient is not None:
                    add_product(hidden_gradient[tokens], gradient, weight_tile)
                if weight_gradient is not None:
                    weight_gradient.add(rows, transposed, tile[: len(gradient)], first=tokens.start == 0)
            if weight_gradient is not None:
                weight_gradient.finish(rows)
        if hidden_gradient is not None:
            if ctx.shard.group is not None:
                dist.all_reduce(hidden_gradient, group=ctx.shard.group)
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return None, hidden_gradient, weight_gradient.result if weight_gradient else None, None, None, None


class _WeightGradient:
    """Where the gradient of a tile of the weight is added up, in float32, and where it goes from there."""

    def __init__(self, weight: Tensor, tiles: Tiles, buffer: Tensor | None):
        self._adds = buffer is not None
        self._target = self._new(weight, tiles) if buffer is None else buffer
        self._tile: Tensor | None = None
        written_once = not self._adds and tiles.num_tokens <= tiles.shape.tokens
        if self._target.dtype != tiles.dtype and not (written_once and tiles.native_products):
            self._tile = weight.new_empty(min(tiles.shape.rows, len(weight)), weight.shape[1], dtype=tiles.dtype)
        self.result = None if self._adds else self._target

    @staticmethod
    def _new(weight: Tensor, tiles: Tiles) -> Tensor:
        """Zeros only where nothing will be written: a large vocabulary's weight is not gone over for nothing."""
        gradient = torch.empty_like(weight)
        gradient[tiles.shard.size if tiles.num_tokens else 0 :] = 0
        return gradient

    def add(self, rows: slice, transposed: Tensor, tile: Tensor, *, first: bool) -> None:
        """A tile's part: ``transposed`` [rows, tokens] · ``tile`` [tokens, H]; ``first``: of these rows."""
        target = self._target[rows]
        part = target if self._tile is None else self._tile[: len(target)]
        if first and (self._tile is not None or not self._adds):
            multiply(transposed, tile, out=part)
        else:
            add_product(part, transposed, tile)

    def finish(self, rows: slice) -> None:
        """After the last token."""
        if self._tile is None:
            return
        target = self._target[rows]
        if self._adds:
            target += self._tile[: len(target)]
        else:
            target.copy_(self._tile[: len(target)])
