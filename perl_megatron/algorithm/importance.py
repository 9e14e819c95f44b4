"""Importance weights for responses that the engine sampled, and the trainer sees with other probabilities.

The engine's kernels, data types and layout are not the trainer's, so tokens come from π_rollout, while the objective
takes them for samples of π_old. The importance ratio v = π_old / π_rollout mends that (decoupled PPO: Hilton et al.
2021, arXiv 2110.00641, where π_old is the proximal policy and π_rollout the behaviour policy). With the objective J_t
of ``objective``, the weights w_t of ``aggregation``, and u_t, which is v_t within bounds:

    L = Σ_t w_t (-u_t J_t + β KL_t)

u is a constant: it has no gradient, stands outside the clip, and leaves the KL term alone. It is bounded, because a few
large weights would be the whole gradient. The w_t stay as they are: a token with u = 0 still counts in the number of
tokens, as in TRL, so that leaving out one token does not raise the weight of all others (veRL's rejection sampling
takes it out of the denominator too).

Shape suffix: R is the number of response tokens of one rollout. Everything here is NumPy, computed once for a whole
response, so it does not matter over how many context-parallel ranks it is cut.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from perl_megatron.algorithm.objective import MAX_LOG_RATIO

Level = Literal["token", "sequence"]
Correction = Literal["truncated", "masked"]


def importance_ratio(logprob_old: np.ndarray, logprob_rollout: np.ndarray, level: Level) -> np.ndarray:
    """v = π_old / π_rollout, of every token or of the whole response.

        'token':     v_t = exp(logprob_old_t - logprob_rollout_t)
        'sequence':  v_t = exp(Σ_s (logprob_old_s - logprob_rollout_s))    the same for all t

    Only the second one makes an expectation over responses exact, but its spread grows with their length; the first one
    leaves out how likely the tokens before t were (Liu, Li et al. 2025, "When Speed Kills Stability: Demystifying RL
    Collapse from the Training-Inference Mismatch", richardli.xyz/rl-collapse).

    Args:
        logprob_old: float [R], by the trainer.
        logprob_rollout: float [R], by the engine.
        level: of which event it is the ratio.

    Returns:
        float64 [R]. Log-ratios are clamped to ±``MAX_LOG_RATIO``, so it is finite and above 0.
    """
    assert logprob_old.shape == logprob_rollout.shape, f"{logprob_old.shape} against {logprob_rollout.shape}"
    log_ratio = logprob_old.astype(np.float64) - logprob_rollout
    if level == "sequence":
        log_ratio = np.full_like(log_ratio, log_ratio.sum())
    else:
        assert level == "token", f"unknown level {level!r}"
    return np.exp(log_ratio.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def bounded_weights(ratio: np.ndarray, correction: Correction, *, low: float, high: float) -> np.ndarray:
    """The weights u that the policy loss is multiplied by, from v = ``importance_ratio``.

        'truncated':  min(v, high)
        'masked':     v where low ≤ v ≤ high, else 0

    Truncated (TIS) is Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    fengyao.notion.site/off-policy-rl; it bounds the variance, for which a weight far below 1 is no danger. Masked is
    IcePop by token (Ling Team 2025, arXiv 2510.18855), and MIS by sequence with low = 0 (Liu, Li et al. 2025); it takes
    a large disagreement, on either side, for a sign that the token or response is not to be learned from.

    Args:
        ratio: float64 [R].
        correction: which one.
        low: the smallest ratio that is kept, at most 1; not used by 'truncated'.
        high: the largest ratio, at least 1.

    Returns:
        float64 [R]; equal to ``ratio`` exactly where no bound was met.
    """
    if correction == "truncated":
        return np.minimum(ratio, high)
    assert correction == "masked", f"unknown correction {correction!r}"
    return np.where((ratio >= low) & (ratio <= high), ratio, 0.0)
