"""Group advantages against a hand-computed case and a plain-Python transcription of PeRL Eq. 5."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.algorithm.advantage import group_advantages
from perl_megatron.errors import UserError


def test_hand_computed():
    # Mean 0.5; deviations ±0.5; unbiased variance (4 · 0.25) / 3 = 1/3.
    advantages = group_advantages(np.array([1.0, 0.0, 1.0, 0.0]), standardize=True)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    np.testing.assert_allclose(advantages, [expected, -expected, expected, -expected], rtol=1e-15)
    assert advantages.dtype == np.float64


def test_without_standardisation_is_centred_only():
    advantages = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), standardize=False)
    np.testing.assert_array_equal(advantages, [0.75, -0.25, -0.25, -0.25])


def test_joint_group_shares_one_baseline():
    # View 0 is always right, view 1 always wrong: per-view baselines would give 0 everywhere.
    advantages = group_advantages(np.array([1.0, 1.0, 0.0, 0.0]), standardize=False)
    np.testing.assert_array_equal(advantages, [0.5, 0.5, -0.5, -0.5])


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1 / 3, -7.7])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_equal_rewards_give_exactly_zero(reward, size, standardize):
    # 0.1 · 3 / 3 ≠ 0.1 in floats: a naive formula leaves noise divided by 1e-6 here.
    assert (group_advantages(np.full(size, reward), standardize=standardize) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(UserError, match=r"\[1\] are not finite"):
        group_advantages(np.array([0.0, bad, 1.0]), standardize=True)


@given(st.lists(st.integers(0, 10), min_size=2, max_size=24), st.booleans())
@settings(deadline=None)
def test_transcription(tenths, standardize):
    rewards = [value / 10 for value in tenths]
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    scale = deviation + 1e-6 if standardize else 1.0
    expected = [(reward - mean) / scale if len(set(tenths)) > 1 else 0.0 for reward in rewards]
    actual = group_advantages(np.array(rewards), standardize=standardize)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
