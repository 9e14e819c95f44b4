"""``scores`` in tiles of tokens × vocabulary, in plain torch: the logits of one tile are all that is ever in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from perl_megatron.kernels import fused, native
from perl_megatron.kernels.fused import Coefficients
from perl_megatron.kernels.scores import ScoreOptions, TokenScores, VocabularyShard
from perl_megatron.kernels.sums import Sums, Top
from perl_megatron.kernels.tiles import Tiles


def score_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions
) -> TokenScores:
    """See ``dispatch.score_tokens``."""
    return fused.score_tokens(_TorchPasses(), hidden, weight, targets, shard, options)


class _TorchPasses:
    """See ``fused.TilePasses``."""

    def make_tiles(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions
    ) -> Tiles:
        return Tiles(hidden, weight, targets, shard, options)

    def add_up(self, tiles: Tiles, top: Top, *, entropy: bool) -> Sums:
        sums = Sums.none(tiles)
        for rows, weight in tiles.row_tiles():
            for tokens, tile in tiles.token_tiles():
                z = tiles.logits(tokens, tile, rows, weight)
                top.fold(tokens, z, rows)
                if native.serves(z):
                    parts = (part[tokens] for part in (sums.maximum, sums.total, sums.weighted, sums.target))
                    native.add_tile(z, tiles.column[tokens] - rows.start, *parts, entropy=entropy)
                    continue
                here, column = tiles.targets_in(tokens, rows)
                sums.target[tokens] += torch.where(here, z.gather(1, column)[:, 0], 0)
                _fold(sums, tokens, z, tiles.scratch(z), entropy=entropy)
        return sums

    def logits_gradient(
        self, tiles: Tiles, coefficients: Coefficients, tokens: slice, tile: Tensor, rows: slice, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = tiles.logits(tokens, tile, rows, weight)
        if native.serves(z):
            out, transposed = z, None
            if tiles.operand_dtype != z.dtype:
                out, transposed = tiles.scratch(z, tiles.operand_dtype), tiles.transposed_scratch(z)
            by_entropy = None if coefficients.by_entropy is None else coefficients.by_entropy[tokens]
            native.gradient_tile(
                z,
                tiles.column[tokens] - rows.start,
                coefficients.maximum[tokens],
                coefficients.constant[tokens],
                by_entropy,
                coefficients.by_log_prob[tokens],
                out,
                transposed,
            )
            return out, out.t() if transposed is None else transposed
        z -= coefficients.maximum[tokens, None]
        constant = coefficients.constant[tokens, None]
        if coefficients.by_entropy is None:
            gradient = z.exp_().mul_(-constant)
        else:
            scratch = torch.exp(z, out=tiles.scratch(z))
            z.mul_(coefficients.by_entropy[tokens, None]).add_(constant)
            gradient = scratch.mul_(z).neg_()
        here, column = tiles.targets_in(tokens, rows)
        gradient.scatter_add_(1, column, torch.where(here, coefficients.by_log_prob[tokens], 0)[:, None])
        gradient = gradient.to(tiles.operand_dtype)
        return gradient, gradient.t()


def _fold(sums: Sums, tokens: slice, z: Tensor, scratch: Tensor, *, entropy: bool) -> None:
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
