"""Which groups may be kept: contradictions among the filter's options, refused before anything starts."""

from __future__ import annotations

from perl_megatron.config.derive_algorithm import check_old_rollouts
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError


def check_filter(config: Config) -> None:
    """UserError where no group could be kept, or where groups would be carried over that nothing knows to be old."""
    chosen, rollout = config.filter, config.rollout
    if chosen.min_accuracy > chosen.max_accuracy:
        raise UserError(
            f"no group has a mean accuracy of at least {chosen.min_accuracy} and at most {chosen.max_accuracy}",
            where="filter.min_accuracy, filter.max_accuracy",
            fix="make filter.min_accuracy the smaller one",
        )
    quotas = chosen.min_right_per_order + chosen.min_wrong_per_order
    if quotas > rollout.num_rollouts:
        raise UserError(
            f"an image order has {rollout.num_rollouts} responses, and {quotas} are asked for",
            where=f"filter.min_right_per_order = {chosen.min_right_per_order}, filter.min_wrong_per_order = "
            f"{chosen.min_wrong_per_order}, rollout.num_rollouts = {rollout.num_rollouts}",
            fix="lower the quotas, or sample more responses",
        )
    if chosen.carry_surplus:
        _check_carrying(config)


def _check_carrying(config: Config) -> None:
    if config.filter.oversample == 1:
        raise UserError(
            "there is never a surplus to carry over: no more questions are drawn than are missing",
            where="filter.carry_surplus = true, filter.oversample = 1.0",
            fix="set filter.oversample to 1.5, say, or leave filter.carry_surplus out",
        )
    check_old_rollouts(config.algorithm, what="carried groups", where="filter.carry_surplus = true")
