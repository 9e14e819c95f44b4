"""Group advantages against hand-computed cases, plain-Python transcriptions of PeRL Eq. 5, and TRL's own code."""

import math

import numpy as np
import pytest
import trl_peer
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.algorithm.advantage import (
    group_advantages,
    step_advantages,
    two_level_advantages,
    view_advantages,
)
from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.errors import UserError

VIEWS = np.array([0, 0, 1, 1])
LEVELS = ["joint", "view", "two_level"]


def of_one_group(rewards, views=None, **settings):
    views = np.zeros(len(rewards), int) if views is None else np.array(views)
    return step_advantages([np.array(rewards, dtype=np.float64)], [views], AlgorithmConfig(**settings))[0]


def test_hand_computed():
    # Mean 0.5; deviations ±0.5; unbiased variance (4 · 0.25) / 3 = 1/3.
    advantages = of_one_group([1.0, 0.0, 1.0, 0.0])
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    np.testing.assert_allclose(advantages, [expected, -expected, expected, -expected], rtol=1e-15)
    assert advantages.dtype == np.float64


def test_without_standardisation_is_centred_only():
    np.testing.assert_array_equal(of_one_group([1.0, 0, 0, 0], standardize=False), [0.75, -0.25, -0.25, -0.25])


def test_the_biased_deviation_divides_by_n():
    expected = 0.5 / (0.5 + 1e-6)
    np.testing.assert_allclose(of_one_group([1.0, 0, 1, 0], deviation="biased"), [expected, -expected] * 2, rtol=1e-15)


def test_leave_one_out_compares_with_the_others():
    # (1 - 1/3), (0 - 2/3), …
    advantages = of_one_group([1.0, 0, 1, 0], baseline="leave_one_out", standardize=False)
    np.testing.assert_allclose(advantages, [2 / 3, -2 / 3, 2 / 3, -2 / 3], rtol=1e-15)


def test_joint_group_shares_one_baseline():
    # View 0 is always right, view 1 always wrong: per-view baselines would give 0 everywhere.
    rewards = [1.0, 1, 0, 0]
    np.testing.assert_array_equal(of_one_group(rewards, VIEWS, standardize=False), [0.5, 0.5, -0.5, -0.5])
    np.testing.assert_array_equal(of_one_group(rewards, VIEWS, standardize=False, advantage_level="view"), [0] * 4)


def test_a_view_without_signal_gets_exactly_zero_beside_one_with():
    rewards = np.array([0.1, 0.1, 1.0, 0.0])
    np.testing.assert_array_equal(view_advantages(rewards, VIEWS, deviation=None), [0.0, 0.0, 0.5, -0.5])
    standardized = view_advantages(rewards, VIEWS)
    assert (standardized[:2] == 0).all()
    np.testing.assert_allclose(standardized[2:], np.array([0.5, -0.5]) / (math.sqrt(0.5) + 1e-6), rtol=1e-15)


def test_views_need_not_stand_together():
    rewards = np.array([3.0, 10.0, 1.0, 20.0])
    np.testing.assert_array_equal(view_advantages(rewards, np.array([0, 1, 0, 1]), deviation=None), [1, -5, -1, 5])


def test_two_levels_add_up_by_their_weights():
    # Across: mean 0.5 → ±0.5; within view 0: 0, view 1: ±0.5.
    rewards = np.array([0.5, 0.5, 1.0, 0.0])
    advantages = two_level_advantages(rewards, VIEWS, within_weight=0.25, deviation=None)
    np.testing.assert_array_equal(advantages, [0, 0, 0.5, -0.5])
    rewards = np.array([1.0, 1.0, 1.0, 0.0])  # mean 0.75
    advantages = two_level_advantages(rewards, VIEWS, within_weight=0.25, deviation=None)
    np.testing.assert_array_equal(advantages, [0.1875, 0.1875, 0.125 + 0.1875, -0.125 - 0.5625])


def test_two_levels_are_half_of_the_share_grpo_releases_sum():
    """Transcribed from R1-ShareVL's compute_grpo_outcome_advantage: each level by its own unbiased deviation."""
    rewards = np.random.default_rng(0).integers(0, 11, 12) / 10
    views = np.repeat([0, 1], 6)
    total = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    for view in (0, 1):
        own = rewards[views == view]
        total[views == view] += (own - own.mean()) / (own.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(2 * of_one_group(rewards, views, advantage_level="two_level"), total, rtol=1e-13)


@pytest.mark.parametrize("within_weight", [0.0, 1.0])
def test_two_levels_end_in_one(within_weight):
    rewards, views = np.array([1.0, 0.2, 0.0, 0.7]), VIEWS
    expected = of_one_group(rewards, views, advantage_level="view" if within_weight else "joint")
    found = of_one_group(rewards, views, advantage_level="two_level", within_weight=within_weight)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize(
    "settings", [{"standardize": False}, *({"deviation": d} for d in ("unbiased", "biased", "batch"))]
)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1 / 3, -7.7])
def test_equal_rewards_give_exactly_zero(reward, settings, baseline, level):
    # 0.1 · 3 / 3 ≠ 0.1 in floats: a naive formula leaves noise divided by 1e-6 here.
    for size in (1, 2, 3, 7, 12):
        advantages = of_one_group(
            [reward] * size, np.arange(size) % 2, advantage_level=level, baseline=baseline, **settings
        )
        assert (advantages == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("level", LEVELS)
def test_reward_that_is_not_finite_is_refused(bad, level):
    with pytest.raises(UserError, match=r"\[1\] are not finite"):
        of_one_group([0.0, bad, 1.0], advantage_level=level)


def test_the_batch_deviation_is_that_of_all_groups():
    groups = [np.array([1.0, 0.0]), np.array([3.0, 3.0]), np.array([2.0, 0.0])]
    found = step_advantages(groups, [np.zeros(2, int)] * 3, AlgorithmConfig(deviation="batch"))
    scale = np.concatenate(groups).std(ddof=1) + 1e-6
    np.testing.assert_allclose(np.concatenate(found), np.array([0.5, -0.5, 0, 0, 1, -1]) / scale, rtol=1e-15)
    assert step_advantages([], [], AlgorithmConfig(deviation="batch")) == []


@given(st.lists(st.integers(0, 10), min_size=2, max_size=24), st.booleans())
@settings(deadline=None)
def test_transcription(tenths, standardize):
    rewards = [value / 10 for value in tenths]
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    scale = deviation + 1e-6 if standardize else 1.0
    expected = [(reward - mean) / scale if len(set(tenths)) > 1 else 0.0 for reward in rewards]
    np.testing.assert_allclose(of_one_group(rewards, standardize=standardize), expected, atol=1e-12)


def random_step(groups=5, size=6):
    return np.random.default_rng(3).random((groups, size))


@pytest.mark.parametrize(
    ("scale_rewards", "settings"),
    [("group", {}), ("batch", {"deviation": "batch"}), ("none", {"standardize": False})],
)
def test_joint_advantages_are_trls(scale_rewards, settings, monkeypatch):
    monkeypatch.setattr("perl_megatron.algorithm.advantage.EPSILON", 1e-4)  # TRL's
    rewards = random_step()
    found = step_advantages(list(rewards), [np.zeros(6, int)] * 5, AlgorithmConfig(**settings))
    # TRL takes the n / (n - 1) of its deviation in float32.
    np.testing.assert_allclose(found, trl_peer.advantages(rewards, scale_rewards=scale_rewards), rtol=1e-7)


def test_leave_one_out_is_trls():
    rewards = random_step()
    algorithm = AlgorithmConfig(baseline="leave_one_out", standardize=False)
    found = step_advantages(list(rewards), [np.zeros(6, int)] * 5, algorithm)
    np.testing.assert_allclose(found, trl_peer.leave_one_out(rewards), rtol=1e-12, atol=1e-15)


def test_within_views_is_trls_with_views_as_questions():
    rewards = random_step(groups=4, size=3)
    found = view_advantages(rewards.ravel(), np.repeat(np.arange(4), 3), deviation=None)
    np.testing.assert_allclose(found.reshape(4, 3), trl_peer.advantages(rewards, scale_rewards="none"), rtol=1e-12)


def test_one_response_alone_has_nothing_to_be_compared_with():
    assert group_advantages(np.array([3.0]), baseline="leave_one_out").tolist() == [0.0]
