"""Consistency and the over-long penalty: hand-computed cases, TRL's penalty, and how they enter the parts."""

import numpy as np
import pytest
import trl_peer
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.algorithm.shaping import add_shaping_parts, consistency, overlong_penalty
from perl_megatron.config.schema import RewardConfig
from perl_megatron.types import Group, Record, Rollout


def test_both_of_a_pair_have_to_be_right():
    accuracy = np.array([1.0, 1, 0, 0, 1, 0, 1, 0])
    views = np.repeat([0, 1], 4)
    np.testing.assert_array_equal(consistency(accuracy, views), [1, 0, 0, 0, 1, 0, 0, 0])


def test_the_original_has_the_share_of_its_copies():
    accuracy = np.array([1.0, 0, 1, 1, 0, 1])  # original, copy 1, copy 2: two responses each
    views = np.array([0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(consistency(accuracy, views), [0.5, 0, 1, 0, 0, 0])


def test_views_need_not_stand_together():
    accuracy, views = np.array([1.0, 1, 0, 1]), np.array([1, 0, 1, 0])
    np.testing.assert_array_equal(consistency(accuracy, views), [1, 1, 0, 0])


@given(st.integers(1, 4), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_transcription(copies, n, random):
    right = [[random.randint(0, 1) for _ in range(n)] for _ in range(copies + 1)]
    found = consistency(np.array(right, float).ravel(), np.repeat(np.arange(copies + 1), n)).reshape(copies + 1, n)
    for k in range(n):
        pairs = [right[0][k] == right[i][k] == 1 for i in range(1, copies + 1)]
        assert found[0, k] == sum(pairs) / copies
        assert found[1:, k].tolist() == pairs


def test_one_view_alone_has_no_pairs():
    with pytest.raises(AssertionError, match="between views"):
        consistency(np.ones(3), np.zeros(3, int))


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (120, -1.0)]
)
def test_overlong_by_hand(num_tokens, penalty):
    assert overlong_penalty(num_tokens, max_tokens=100, buffer=20) == pytest.approx(penalty, rel=1e-15)


@given(st.integers(0, 300), st.integers(1, 200), st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_overlong_is_trls(num_tokens, max_tokens, buffer):
    buffer = min(buffer, max_tokens)
    expected = trl_peer.overlong_penalty(num_tokens, max_tokens, buffer)
    assert overlong_penalty(num_tokens, max_tokens=max_tokens, buffer=buffer) == expected


def group_of(*rollouts: tuple[int, float, int]) -> Group:
    """Of (view, accuracy, number of tokens)."""
    made = [
        Rollout(
            view, np.zeros(length, np.int64), np.zeros(length), "stop", "", np.zeros(length, np.int64), {"accuracy": a}
        )
        for view, a, length in rollouts
    ]
    return Group(Record("r", (), "?", "7"), (), (), made)


def test_parts_are_recorded_only_where_they_have_a_weight():
    group = group_of((0, 1.0, 4), (0, 0.0, 10), (1, 1.0, 8), (1, 1.0, 2))
    add_shaping_parts(group, RewardConfig(), max_response_tokens=10)
    assert all(set(rollout.reward_parts) == {"accuracy"} for rollout in group.rollouts)
    add_shaping_parts(group, RewardConfig(consistency=0.5, overlong=1.0, overlong_buffer=4), max_response_tokens=10)
    assert [rollout.reward_parts["consistency"] for rollout in group.rollouts] == [1, 0, 1, 0]
    assert [rollout.reward_parts["overlong"] for rollout in group.rollouts] == [0, -1, -0.5, 0]
