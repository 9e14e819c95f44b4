"""The exact divergence of two policies' distributions of the next token, without logits of all tokens in memory.

    KL(p ‖ q) = Σ_v p_v (log p_v - log q_v)

over the whole vocabulary, where p and q are as in ``scores``. The estimators of the algorithm (``k1`` to ``k3``) see
only the sampled token; this is what they estimate. Not differentiable. In float32 its error is about 10⁻⁶ nats, however
close the policies are.

It is a pass of its own, as a reference policy's weights are at hand at another time than the policy's: both policies'
logits are computed, in twice as many tiles as ``tiled`` needs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from perl_megatron.kernels.scores import IGNORED, ScoreOptions, VocabularyShard, check_inputs
from perl_megatron.kernels.tiles import Tiles

Policy = tuple[Tensor, Tensor]
"""(hidden states [T, H], output weight [rows, H]); the two policies may differ in H and in dtype."""


@torch.no_grad()
def exact_kl(
    first: Policy,
    second: Policy,
    targets: Tensor,
    *,
    shard: VocabularyShard | None = None,
    options: ScoreOptions | None = None,
) -> Tensor:
    """KL(first ‖ second) in nats, float32 [T] (float64 where the first's hidden states are); equal on all ranks.

    ``targets`` int64 [T] say only which tokens are ``IGNORED`` (theirs is 0); of ``options`` temperature and banned
    tokens count. Both weights are the rows of the same ``shard``. Raises ValueError as ``dispatch.score_tokens``.
    """
    shard, options = shard or VocabularyShard.whole(first[1]), options or ScoreOptions()
    for policy in (first, second):
        check_inputs(*policy, targets, shard, options)
    p, q = (Tiles(*policy, targets, shard, options) for policy in (first, second))
    sums = _DivergenceSums(p)
    for (rows, weight_p), (_, weight_q) in zip(p.row_tiles(), q.row_tiles(), strict=True):
        for (tokens, tile_p), (_, tile_q) in zip(p.token_tiles(), q.token_tiles(), strict=True):
            z_p = p.logits(tokens, tile_p, rows, weight_p)
            z_q = q.logits(tokens, tile_q, rows, weight_q)
            sums.fold(tokens, z_p, z_q.to(p.dtype), p.scratch(z_p))
    sums.reduce(shard.group)
    return torch.where(targets != IGNORED, sums.result(), 0)


class _DivergenceSums:
    """Over the tiles so far, all [T], with m_p and m_q the largest z of each policy."""

    def __init__(self, tiles: Tiles):
        self._maximum_p, self._maximum_q = tiles.lowest(), tiles.lowest()
        self._total_p, self._total_q = tiles.new_values(0), tiles.new_values(0)
        self._difference = tiles.new_values(0)
        """Σ exp(z_p - m_p) · ((z_p - m_p) - (z_q - m_q))."""

    def fold(self, tokens: slice, z_p: Tensor, z_q: Tensor, scratch: Tensor) -> None:
        """Add the tile's logits; destroys them."""
        self._shift(tokens, torch.maximum(self._maximum_p[tokens], z_p.amax(1)), z_q.amax(1))
        z_p -= self._maximum_p[tokens, None]
        z_q -= self._maximum_q[tokens, None]
        torch.exp(z_q, out=scratch)
        self._total_q[tokens] += scratch.sum(1)
        torch.exp(z_p, out=scratch)
        self._total_p[tokens] += scratch.sum(1)
        # Term by term, as most of two policies that are close cancels.
        self._difference[tokens] += z_p.sub_(z_q).mul_(scratch).sum(1)

    def _shift(self, tokens: slice, maximum_p: Tensor, maximum_q: Tensor) -> None:
        """To new maxima, which are at least the old ones."""
        maximum_q = torch.maximum(self._maximum_q[tokens], maximum_q)
        change_p, change_q = self._maximum_p[tokens] - maximum_p, self._maximum_q[tokens] - maximum_q
        total, decay = self._total_p[tokens], change_p.exp()
        self._difference[tokens] = (self._difference[tokens] + total * (change_p - change_q)) * decay
        self._total_p[tokens] = total * decay
        self._total_q[tokens] *= change_q.exp()
        self._maximum_p[tokens], self._maximum_q[tokens] = maximum_p, maximum_q

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """From this rank's rows to the whole vocabulary."""
        if group is None:
            return
        maxima = torch.stack([self._maximum_p, self._maximum_q])
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        self._shift(slice(None), *maxima)
        packed = torch.stack([self._total_p, self._total_q, self._difference])
        dist.all_reduce(packed, group=group)
        self._total_p, self._total_q, self._difference = packed

    def result(self) -> Tensor:
        """[T]."""
        return self._difference / self._total_p - (self._total_p / self._total_q).log()
