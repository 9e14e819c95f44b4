"""The definition of ``scores``, in plain torch on all logits at once: what every other backend must equal.

It needs T×V logits on every rank (those of all shards are gathered), which is why there are other backends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from perl_megatron.kernels.scores import (
    BANNED_BIAS,
    IGNORED,
    ScoreOptions,
    TokenScores,
    VocabularyShard,
    dtype_of_computation,
    temperatures,
)


def score_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions
) -> TokenScores:
    """See ``dispatch.score_tokens``."""
    dtype, counts = dtype_of_computation(hidden), targets != IGNORED
    hidden = torch.where(counts[:, None], hidden, 0).to(dtype)
    if shard.group is not None:
        hidden = _Replicated.apply(hidden, shard.group)
    buffer = options.gradient_buffer
    weight = weight.to(dtype) if buffer is None else _IntoBuffer.apply(weight, dtype, buffer)
    logits = hidden @ weight[: shard.size].t()
    if shard.group is not None:
        logits = _Gathered.apply(logits, shard)
    bias = torch.zeros(shard.total, dtype=dtype, device=hidden.device)
    bias[list(options.banned_token_ids)] = BANNED_BIAS
    temperature = temperatures(options, counts, dtype)
    z = logits + bias if temperature is None else (logits + bias) / temperature[:, None]
    log_p = z.log_softmax(1)
    known = (targets >= 0) & (targets < shard.total)
    column = torch.where(known, targets, 0)[:, None]
    log_prob = torch.where(known, log_p.gather(1, column)[:, 0], torch.nan)
    entropy = -(log_p.exp() * log_p).sum(1) if options.entropy else torch.zeros_like(log_prob)
    with torch.no_grad():
        top = log_p.topk(options.top_k, dim=1)
        is_top = counts & ~log_prob.isnan() & (z.gather(1, column)[:, 0] == z.amax(1))
    return TokenScores(
        log_prob=torch.where(counts, log_prob, 0),
        entropy=torch.where(counts, entropy, 0),
        log_sum_exp=torch.where(counts, z.detach().logsumexp(1), 0),
        is_top=is_top,
        top_log_probs=torch.where(counts[:, None], top.values, 0),
        top_ids=torch.where(counts[:, None], top.indices, 0),
    )


class _IntoBuffer(torch.autograd.Function):
    """The weight in ``dtype``; its gradient is added to the buffer and ends there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return weight.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.buffer.add_(gradient)
        return None, None, None


class _Replicated(torch.autograd.Function):
    """Hidden states, equal on all ranks, each of which uses them for its own logits: gradients add up."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Gathered(torch.autograd.Function):
    """The whole vocabulary's logits from each rank's; all ranks compute the same with them, so each takes its part."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: VocabularyShard) -> Tensor:
        ctx.shard = shard
        whole = logits.new_zeros(len(logits), shard.total)
        whole[:, shard.first : shard.first + shard.size] = logits
        dist.all_reduce(whole, group=shard.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, ctx.shard.first : ctx.shard.first + ctx.shard.size], None
