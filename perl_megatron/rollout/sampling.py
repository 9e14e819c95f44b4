"""The sampling distribution, and draws from it that depend on nothing but a uniform number.

Shapes: N sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from perl_megatron.rollout.engine import BANNED_LOGIT_BIAS


def log_distribution(
    logits_NV: torch.Tensor, *, temperature: float, top_p: float, banned_token_ids: Sequence[int]
) -> torch.Tensor:
    """float32 [N, V]: log-probabilities sampled from; excluded tokens have -inf.

    As vLLM's processed log-probabilities: the bias on banned tokens first, then the temperature, then the smallest set
    of most likely tokens that holds at least ``top_p`` of the mass, renormalised. Temperature 0 (greedy) is scored at
    temperature 1 and over the whole vocabulary.
    """
    logits_NV = logits_NV.float().clone()
    logits_NV[:, list(banned_token_ids)] += BANNED_LOGIT_BIAS
    if temperature > 0:
        logits_NV /= temperature
        if top_p < 1:
            logits_NV.masked_fill_(_outside_nucleus(logits_NV, top_p), float("-inf"))
    return logits_NV.log_softmax(dim=-1)


def _outside_nucleus(logits_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    ascending_NV, index_NV = logits_NV.sort(dim=-1)
    outside_NV = ascending_NV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    outside_NV[:, -1] = False
    return torch.zeros_like(outside_NV).scatter_(-1, index_NV, outside_NV)


def draw(log_probs_NV: torch.Tensor, uniforms_N: torch.Tensor | None) -> torch.Tensor:
    """int64 [N]: for each row the token at which the cumulated probability passes its uniform float64 number in [0, 1).

    None instead of numbers is greedy. A token of probability zero is never drawn. Inverting the cumulated distribution
    makes a draw nearly independent of float rounding, and so of what else is in the batch.
    """
    if uniforms_N is None:
        return log_probs_NV.argmax(dim=-1)
    cumulated_NV = log_probs_NV.double().exp().cumsum(dim=-1)
    total_N1 = cumulated_NV[:, -1:]
    below_total_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    target_N1 = torch.minimum(uniforms_N[:, None] * total_N1, below_total_N1)
    return torch.searchsorted(cumulated_NV, target_N1, right=True)[:, 0]
