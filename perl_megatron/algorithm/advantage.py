"""Group-relative advantages: which responses a reward is compared with, and how.

PeRL compares all responses to all views of a question (arXiv 2506.14907, Eq. 5). Others compare within each view, or on
both levels. Shape suffix: G is the number of responses of one group, (n_s + 1) · n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.errors import UserError

EPSILON = 1e-6
"""Added to the standard deviation, as PeRL's released code does (the paper's equation has none)."""

Baseline = Literal["mean", "leave_one_out"]
Deviation = Literal["unbiased", "biased"] | float | None
"""What an advantage is divided by: the standard deviation of the rewards compared, by n - 1 or by n; a number, which is
that of other rewards too; None: nothing."""


def group_advantages(
    rewards: np.ndarray, *, baseline: Baseline = "mean", deviation: Deviation = "unbiased"
) -> np.ndarray:
    """Advantages of responses that are all compared with each other.

    With R̄ the mean over the responses, n their number and s the deviation:

        A_k = (r_k - b_k) / (s + 1e-6)      PeRL Eq. 5, GRPO (arXiv 2402.03300, Eq. 3 with outcome rewards)
        A_k =  r_k - b_k                    deviation None: Dr.GRPO (arXiv 2503.20783), RLOO

        b_k = R̄                             baseline 'mean'
        b_k = Σ_{j ≠ k} r_j / (n - 1)       baseline 'leave_one_out': RLOO (Ahmadian et al. 2024, arXiv 2402.14740)

    The leave-one-out form is the other one times n / (n - 1): r_k - b_k = (r_k - R̄) · n / (n - 1).

    Responses whose rewards are all equal carry no signal: their advantages are exactly 0, never rounding noise divided
    by epsilon. That also covers a single response, whose deviation and whose other responses do not exist.

    Args:
        rewards: float64 [G], finite.
        baseline: what is subtracted.
        deviation: what is divided by.

    Returns:
        float64 [G].
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    assert rewards.ndim == 1, f"rewards of one group must be one-dimensional, not {rewards.shape}"
    assert rewards.size, "a group without rollouts has no advantages"
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if baseline == "leave_one_out":
        centred = centred * rewards.size / (rewards.size - 1)
    if deviation is None:
        return centred
    if isinstance(deviation, str):
        deviation = float(rewards.std(ddof=0 if deviation == "biased" else 1))
    return centred / (deviation + EPSILON)


def view_advantages(
    rewards: np.ndarray, views: np.ndarray, *, baseline: Baseline = "mean", deviation: Deviation = "unbiased"
) -> np.ndarray:
    """``group_advantages`` within each view by itself: GRPO as if every view were a question of its own.

    A view whose own rewards are all equal gets exactly 0, whatever the other views' are.

    Args:
        rewards: float64 [G], finite.
        views: int [G], the view that each response answers.
        baseline: what is subtracted.
        deviation: what is divided by.

    Returns:
        float64 [G].
    """
    rewards, views = np.asarray(rewards, dtype=np.float64), np.asarray(views)
    assert rewards.shape == views.shape, f"{rewards.shape} rewards of {views.shape} views"
    advantages = np.empty_like(rewards)
    for view in np.unique(views):
        own = views == view
        advantages[own] = group_advantages(rewards[own], baseline=baseline, deviation=deviation)
    return advantages


def two_level_advantages(
    rewards: np.ndarray,
    views: np.ndarray,
    *,
    within_weight: float,
    baseline: Baseline = "mean",
    deviation: Deviation = "unbiased",
) -> np.ndarray:
    """Advantages within the view and across all views, added up (Share-GRPO: Yao et al. 2025, arXiv 2505.16673).

        A = w · A_within + (1 - w) · A_across

    A_within is ``view_advantages``, A_across is ``group_advantages`` over all views (what the paper calls local and
    global). The released code adds both with weight 1, which is 2 A at w = 1/2: the same direction. It also trains each
    question variant on the other variants' responses, which is not done here.

    Args:
        rewards: float64 [G], finite.
        views: int [G], the view that each response answers.
        within_weight: w, in [0, 1].
        baseline: what is subtracted, on both levels.
        deviation: what is divided by; 'unbiased' and 'biased' are each level's own.

    Returns:
        float64 [G].
    """
    within = view_advantages(rewards, views, baseline=baseline, deviation=deviation)
    across = group_advantages(rewards, baseline=baseline, deviation=deviation)
    return within_weight * within + (1 - within_weight) * across


def step_advantages(
    rewards: Sequence[np.ndarray], views: Sequence[np.ndarray], algorithm: AlgorithmConfig
) -> list[np.ndarray]:
    """Advantages of all groups of a step, as `algorithm.advantage_level` and the fields beside it say.

    With `algorithm.deviation` = 'batch' the deviation is the unbiased one of all rewards of the step, around their
    common mean (TRL's ``scale_rewards="batch"``; "Tricks or Traps?", Liu et al. 2025, arXiv 2508.08221).

    Args:
        rewards: for each group float64 [G].
        views: for each group int [G], the view that each response answers.
        algorithm: level, weight, baseline, standardisation, deviation.

    Returns:
        float64 [G] for each group.

    Raises:
        UserError: a reward is NaN or infinite.
    """
    for one in rewards:
        _check_finite(one)
    deviation: Deviation = None
    if algorithm.standardize:
        deviation = _batch_deviation(rewards) if algorithm.deviation == "batch" else algorithm.deviation
    baseline, weight = algorithm.baseline, algorithm.within_weight
    pairs = zip(rewards, views, strict=True)
    if algorithm.advantage_level == "joint":
        return [group_advantages(one, baseline=baseline, deviation=deviation) for one, _ in pairs]
    if algorithm.advantage_level == "view":
        return [view_advantages(one, of, baseline=baseline, deviation=deviation) for one, of in pairs]
    return [
        two_level_advantages(one, of, within_weight=weight, baseline=baseline, deviation=deviation) for one, of in pairs
    ]


def _batch_deviation(rewards: Sequence[np.ndarray]) -> float:
    """Of all rewards of the step; 0 where there is one at most, and then no group has a signal."""
    everything = np.concatenate([np.zeros(0), *rewards])
    return float(everything.std(ddof=1)) if everything.size > 1 else 0.0


def _check_finite(rewards: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(rewards)).tolist()
    if bad:
        raise UserError(f"the rewards of rollouts {bad} are not finite", fix="mend the reward function")
