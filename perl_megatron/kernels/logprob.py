"""Log-probability and entropy of tokens from vocabulary-parallel logits: the reference that faster kernels must equal.

With z = (logits + bias) / temperature, where the bias of a banned token is -100 (as vLLM's ``logit_bias``, applied
before the temperature, as vLLM does), and p = softmax(z) over the whole vocabulary:

    log_prob = z[target] - log Σ exp(z)          ∂ log_prob / ∂z_j = [j = target] - p_j
    entropy  = log Σ exp(z) - Σ p·z              ∂ entropy  / ∂z_j = -p_j (log p_j + entropy)

The ranks of ``group`` hold equal consecutive parts of the vocabulary. Two collectives forward (a maximum [T] and one
packed sum [3, T]), none backward: each rank's gradient needs only its own logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

BANNED_BIAS = -100.0


def vocabulary_parallel_log_prob(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    banned_token_ids: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log_prob [T], entropy [T]) in nats, both differentiable with respect to ``logits``.

    ``logits`` [T, V / group size], any floating dtype; ``targets`` int64 [T], ids in the whole vocabulary, equal on all
    ranks; ``group`` None for a whole vocabulary. Computed and returned in float32 (float64 for float64 logits).
    """
    assert temperature > 0
    assert logits.dim() == 2
    assert targets.shape == logits.shape[:1]
    size = 1 if group is None else group.size()
    first = 0 if group is None else group.rank() * logits.shape[1]
    own_banned = [token - first for token in banned_token_ids if first <= token < first + logits.shape[1]]
    return _LogProb.apply(logits, targets, first, group if size > 1 else None, temperature, tuple(own_banned))


def _scaled(logits: torch.Tensor, temperature: float, banned: tuple[int, ...]) -> torch.Tensor:
    """z [T, V / tp] in the dtype of computation; a copy."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if banned:
        scaled[:, list(banned)] += BANNED_BIAS
    return scaled.div_(temperature)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        first: int,
        group: dist.ProcessGroup | None,
        temperature: float,
        banned: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = _scaled(logits, temperature, banned)
        column = targets - first
        here = (column >= 0) & (column < z.shape[1])
        column = column.clamp(0, z.shape[1] - 1)
        maximum = z.amax(dim=1)
        if group is not None:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        z -= maximum[:, None]
        target = torch.where(here, z.gather(1, column[:, None])[:, 0], 0.0)
        exponential = z.exp()
        sums = torch.stack([exponential.sum(1), (exponential * z).sum(1), target])
        if group is not None:
            dist.all_reduce(sums, group=group)
        total, weighted, target = sums
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(logits, column, here, maximum + log_total, entropy)
        ctx.temperature, ctx.banned = temperature, banned
        return target - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, column, here, log_normaliser, entropy = ctx.saved_tensors
        log_p = _scaled(logits, ctx.temperature, ctx.banned).sub_(log_normaliser[:, None])
        p = log_p.exp()
        grad = -p * (grad_log_prob[:, None] + grad_entropy[:, None] * (log_p + entropy[:, None]))
        grad.scatter_add_(1, column[:, None], torch.where(here, grad_log_prob, 0.0)[:, None])
        return grad.div_(ctx.temperature).to(logits.dtype), None, None, None, None, None
