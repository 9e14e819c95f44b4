"""Group-relative advantages over the joint group of all views (PeRL, arXiv 2506.14907, Eq. 5)."""

from __future__ import annotations

import numpy as np

from perl_megatron.errors import UserError

EPSILON = 1e-6
"""Added to the standard deviation, as PeRL's released code does (the paper's equation has none)."""


def group_advantages(rewards: np.ndarray, *, standardize: bool) -> np.ndarray:
    """Advantages of one joint group: all rollouts of all views of one question share a baseline.

    With R̄ the mean over the group and s its unbiased standard deviation (n - 1):

        A_k = (r_k - R̄) / (s + 1e-6)    standardize: PeRL Eq. 5, with the released code's std and epsilon
        A_k =  r_k - R̄                  otherwise: Dr.GRPO (arXiv 2503.20783)

    A group whose rewards are all equal carries no signal: its advantages are exactly 0, never rounding noise
    divided by epsilon. That also covers a group of one, whose unbiased deviation is not defined.

    Args:
        rewards: float64 [G], G = (n_s + 1) · n.
        standardize: whether to divide by the standard deviation.

    Returns:
        float64 [G].

    Raises:
        UserError: a reward is NaN or infinite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    assert rewards.ndim == 1, f"rewards of one group must be one-dimensional, not {rewards.shape}"
    assert rewards.size, "a group without rollouts has no advantages"
    if not np.isfinite(rewards).all():
        bad = np.flatnonzero(~np.isfinite(rewards)).tolist()
        raise UserError(f"the rewards of rollouts {bad} are not finite", fix="mend the reward function")
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if not standardize:
        return centred
    return centred / (rewards.std(ddof=1) + EPSILON)
