"""The group filter: every reason, the order of checks, inclusive bounds, exact equality of rewards."""

import numpy as np
import pytest

from perl_megatron.algorithm.filter import judge
from perl_megatron.config.schema import FilterConfig, RewardConfig
from perl_megatron.reward.score import total
from perl_megatron.types import Group, Record, Rollout

OFF = FilterConfig(no_signal=False)


def group(*parts, truncated=0, unreadable=0, num_views=1, rewards=None):
    """Rollouts with (accuracy, format) parts, as many of each view; the last ones cut, or without an answer."""
    rollouts = []
    for index, (accuracy, form) in enumerate(parts):
        scored = {"accuracy": float(accuracy), "format": float(form)}
        rollouts.append(
            Rollout(
                view_index=index * num_views // len(parts),
                token_ids=np.zeros(1, np.int64),
                logprob_rollout=np.zeros(1, np.float32),
                finish_reason="length" if index >= len(parts) - truncated else "stop",
                text="",
                weight_versions=np.zeros(1, dtype=np.int64),
                readable=index < len(parts) - unreadable,
                reward_parts=scored,
                reward=total(scored, RewardConfig()) if rewards is None else rewards[index],
            )
        )
    return Group(Record("r", (), "?", "1"), (), (), rollouts)


def reason(group, config):
    verdict = judge(group, config)
    assert verdict.keep is (verdict.reason == "kept")
    return verdict.reason


@pytest.mark.parametrize("parts", [(0, 0), (1, 0), (1, 1)])
def test_equal_rewards_have_no_signal(parts):
    assert reason(group(parts, parts, parts), FilterConfig()) == "no_signal"
    assert reason(group(parts, parts, parts), OFF) == "kept"


def test_a_signal_between_views_alone_is_none_where_views_are_compared_by_themselves():
    between = group((1, 1), (1, 1), (0, 1), (0, 1), num_views=2)
    assert judge(between, FilterConfig()).keep
    assert judge(between, FilterConfig(), within_views=True).reason == "no_signal"
    within = group((1, 1), (1, 1), (0, 1), (1, 1), num_views=2)
    assert judge(within, FilterConfig(), within_views=True).keep


def test_format_alone_is_a_signal():
    assert reason(group((1, 0), (1, 1)), FilterConfig()) == "kept"


def test_equal_parts_are_equal_whatever_rounding_did_to_the_rewards():
    assert reason(group((1, 1), (1, 1), rewards=[1.0, 1.0 + 2**-52]), FilterConfig()) == "no_signal"


def test_different_parts_of_the_same_weight_have_no_signal():
    config = RewardConfig(accuracy=0.5, format=0.5)
    rewards = [total({"accuracy": a, "format": f}, config) for a, f in ((1.0, 0.0), (0.0, 1.0))]
    assert reason(group((1, 0), (0, 1), rewards=rewards), FilterConfig()) == "no_signal"


def test_accuracy_band_is_inclusive():
    three_of_ten = group(*[(1, 1)] * 3, *[(0, 1)] * 7)
    assert reason(three_of_ten, FilterConfig(min_accuracy=0.3, max_accuracy=0.3)) == "kept"
    assert reason(three_of_ten, FilterConfig(min_accuracy=0.31)) == "accuracy_low"
    assert reason(three_of_ten, FilterConfig(max_accuracy=0.29)) == "accuracy_high"


def test_truncated_share():
    half = group((1, 1), (0, 1), (0, 0), (0, 0), truncated=2)
    assert reason(half, FilterConfig(max_truncated=0.5)) == "kept"
    assert reason(half, FilterConfig(max_truncated=0.49)) == "truncated"


def test_unparsable_share():
    third = group((1, 1), (0, 1), (0, 0), unreadable=1)
    assert reason(third, FilterConfig(max_unparsable=1 / 3)) == "kept"
    assert reason(third, FilterConfig(max_unparsable=0.33)) == "unparsable"


def test_every_order_needs_its_right_and_its_wrong_answers():
    right, wrong = (1, 1), (0, 1)
    one_sided = group(right, right, wrong, wrong, num_views=2)
    assert reason(one_sided, FilterConfig()) == "kept"
    assert reason(one_sided, FilterConfig(min_right_per_order=1)) == "order_quota"
    assert reason(one_sided, FilterConfig(min_wrong_per_order=1)) == "order_quota"
    mixed = group(right, wrong, wrong, right, num_views=2)
    both = FilterConfig(min_right_per_order=1, min_wrong_per_order=1)
    assert reason(mixed, both) == "kept"
    assert reason(mixed, both.model_copy(update={"min_right_per_order": 2})) == "order_quota"


def test_half_an_answer_is_not_a_right_one():
    halves = group((0.5, 1), (1, 1))
    assert reason(halves, FilterConfig(min_right_per_order=2)) == "order_quota"
    assert reason(halves, FilterConfig(min_right_per_order=1, min_wrong_per_order=1)) == "kept"


def test_order_of_checks():
    strict = FilterConfig(
        min_accuracy=0.5, max_accuracy=0.5, max_truncated=0.0, max_unparsable=0.0, min_right_per_order=2
    )
    without = strict.model_copy(update={"no_signal": False})
    assert reason(group((0, 0), (0, 0), truncated=2), strict) == "no_signal"
    assert reason(group((0, 0), (0, 0), truncated=2), without) == "accuracy_low"
    assert reason(group((1, 0), (1, 0), truncated=2), without) == "accuracy_high"
    assert reason(group((1, 0), (0, 0), truncated=2, unreadable=2), strict) == "truncated"
    assert reason(group((1, 0), (0, 0), unreadable=2), strict) == "unparsable"
    assert reason(group((1, 0), (0, 0)), strict) == "order_quota"


def test_missing_reward_is_an_error():
    broken = group((1, 1), (0, 1))
    broken.rollouts[1].reward = None
    with pytest.raises(AssertionError, match="no reward yet"):
        judge(broken, FilterConfig())
