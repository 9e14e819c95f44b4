"""Reward parts that a response's text alone does not decide: its length, and what the group's other views got right.

They are parts like accuracy and format (``reward/score.py``): recorded under the name of their weight in
``RewardConfig``, before it is applied, and only where that weight is above 0. The penalty is negative.
"""

from __future__ import annotations

import numpy as np

from perl_megatron.config.schema import RewardConfig
from perl_megatron.types import Group


def add_shaping_parts(group: Group, reward: RewardConfig, *, max_response_tokens: int) -> None:
    """Add `consistency` and `overlong` to the parts of every rollout of a group whose accuracy is known."""
    rollouts = group.rollouts
    if reward.consistency > 0:
        accuracy = np.array([rollout.correctness for rollout in rollouts])
        views = np.array([rollout.view_index for rollout in rollouts])
        for rollout, part in zip(rollouts, consistency(accuracy, views), strict=True):
            rollout.reward_parts["consistency"] = float(part)
    if reward.overlong > 0:
        for rollout in rollouts:
            rollout.reward_parts["overlong"] = overlong_penalty(
                len(rollout.token_ids), max_tokens=max_response_tokens, buffer=reward.overlong_buffer
            )


def consistency(accuracy: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Being right together with the response to another view (ConsistRoll: Zou et al. 2026, arXiv 2606.29812).

    Response k to the original (view 0) is paired with response k to each copy i = 1 … n_s:

        c_{i,k} = a_{0,k} · a_{i,k}                  a copy's: 1 if both are right
        c_{0,k} = (1 / n_s) Σ_i a_{0,k} · a_{i,k}    the original's: the share of copies that are right with it

    "Consistent" needs no test of its own: every view's accuracy is against the view's own answer, so two right answers
    are the same answer after the permutation contract's transform, although their texts may differ. The paper pairs an
    original with one transformed view, which is n_s = 1 here, and rewards nothing else; here the joint reward is a part
    beside accuracy and format, whose weights may be set to 0.

    Args:
        accuracy: float [G], G = (n_s + 1) · n, from 0 to 1.
        views: int [G], the view that each response answers; all have the same number, and there are two at least.

    Returns:
        float64 [G], from 0 to 1.
    """
    of_views = [np.flatnonzero(views == view) for view in np.unique(views)]
    assert len(of_views) > 1, "consistency is between views"
    assert len({len(places) for places in of_views}) == 1, "responses of all views are paired"
    original, copies = of_views[0], np.stack(of_views[1:])
    together = accuracy[original].astype(np.float64) * accuracy[copies]
    parts = np.empty(len(accuracy))
    parts[original] = together.mean(axis=0)
    parts[copies] = together
    return parts


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment of long responses (Yu et al. 2025, arXiv 2503.14476, Eq. 13).

        0                                        where R ≤ L_max - L_cache
        ((L_max - L_cache) - R) / L_cache        beyond, down to -1 at L_max

    A response of more than L_max tokens does not exist here: it was cut at L_max, and has -1.

    Args:
        num_tokens: R, the end-of-turn token included.
        max_tokens: L_max, at which a response is cut.
        buffer: L_cache, in 1 … L_max.
    """
    assert 1 <= buffer <= max_tokens, f"a buffer of {buffer} tokens within {max_tokens}"
    return max(-1.0, min(0.0, (max_tokens - buffer - num_tokens) / buffer))
