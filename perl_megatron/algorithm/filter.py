"""Which groups are worth an update: online rollout filtering with named reasons (DAPO's dynamic sampling).

PeRL's own rollout filter is offline (the base model's accuracy decides what is in the data set); this is the same idea
applied to every group as it is sampled. The caller counts the reasons and draws again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perl_megatron.config.schema import FilterConfig
from perl_megatron.types import Group, Rollout

Reason = Literal["kept", "no_signal", "accuracy_low", "accuracy_high", "truncated", "unparsable", "order_quota"]


@dataclass(frozen=True)
class Verdict:
    """Whether a group is kept, and why not."""

    keep: bool
    reason: Reason


def judge(group: Group, config: FilterConfig, *, within_views: bool = False) -> Verdict:
    """The first reason to drop ``group``, checked in this order; 'kept' if there is none.

    1. ``no_signal``: all rewards are exactly equal, so all advantages are 0 (see ``has_signal``).
    2. ``accuracy_low``: the mean of ``Rollout.correctness`` is below ``config.min_accuracy``.
    3. ``accuracy_high``: that mean is above ``config.max_accuracy``.
    4. ``truncated``: more than ``config.max_truncated`` of the responses were cut at the token limit.
    5. ``unparsable``: more than ``config.max_unparsable`` of the responses hold no answer that can be graded.
    6. ``order_quota``: in some image order fewer than ``config.min_right_per_order`` responses are right
       (correctness 1), or fewer than ``config.min_wrong_per_order`` are not.

    ``within_views`` says that rewards are compared within each view only (`algorithm.advantage_level` = 'view', or
    'two_level' with all its weight within).
    All bounds are inclusive: a group exactly on a bound is kept.
    """
    rollouts = group.rollouts
    assert rollouts, f"the group of {group.record.id} has no rollouts"
    accuracy = math.fsum(rollout.correctness for rollout in rollouts) / len(rollouts)
    truncated = sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts)
    assert not any(rollout.reward is None for rollout in rollouts), f"rollouts of {group.record.id} have no reward yet"
    assert not math.isnan(accuracy), f"an accuracy of {group.record.id} is NaN"
    if config.no_signal and not has_signal(group, within_views=within_views):
        return Verdict(False, "no_signal")
    if accuracy < config.min_accuracy:
        return Verdict(False, "accuracy_low")
    if accuracy > config.max_accuracy:
        return Verdict(False, "accuracy_high")
    if truncated > config.max_truncated:
        return Verdict(False, "truncated")
    if sum(not rollout.readable for rollout in rollouts) > config.max_unparsable * len(rollouts):
        return Verdict(False, "unparsable")
    if not _meets_quotas(group, config):
        return Verdict(False, "order_quota")
    return Verdict(True, "kept")


def _meets_quotas(group: Group, config: FilterConfig) -> bool:
    """Whether every view has its share of right and of wrong answers."""
    by_view: defaultdict[int, list[bool]] = defaultdict(list)
    for rollout in group.rollouts:
        by_view[rollout.view_index].append(rollout.correctness == 1)
    return all(
        sum(right) >= config.min_right_per_order and len(right) - sum(right) >= config.min_wrong_per_order
        for right in by_view.values()
    )


def has_signal(group: Group, *, within_views: bool = False) -> bool:
    """Whether any two rewards of the group differ; with ``within_views``, any two of the same view.

    Exact, without tolerance: equal parts mean equal rewards whatever the weights are, and different parts that weigh
    the same have the same float, because ``reward.score.total`` rounds the exact rational sum once.
    """
    if not within_views:
        return _differ(group.rollouts)
    views = {rollout.view_index for rollout in group.rollouts}
    return any(_differ([rollout for rollout in group.rollouts if rollout.view_index == view]) for view in views)


def _differ(rollouts: Sequence[Rollout]) -> bool:
    parts = {tuple(sorted(rollout.reward_parts.items())) for rollout in rollouts}
    return len(parts) > 1 and len({rollout.reward for rollout in rollouts}) > 1
