"""Token weights: hand-computed, normalised, and independent of the split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.algorithm.aggregation import token_weights


def test_hand_computed():
    by_token = token_weights([1, 3], "token", total_tokens=4, total_sequences=2)
    by_sequence = token_weights([1, 3], "sequence", total_tokens=4, total_sequences=2)
    by_constant = token_weights([1, 3], "constant", total_tokens=4, total_sequences=2, max_tokens=5)
    np.testing.assert_array_equal(np.concatenate(by_token), [1 / 4] * 4)
    np.testing.assert_array_equal(np.concatenate(by_sequence), [1 / 2, 1 / 6, 1 / 6, 1 / 6])
    np.testing.assert_array_equal(np.concatenate(by_constant), [1 / 10] * 4)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(0, 20), st.sampled_from(["token", "sequence"])
)
@settings(deadline=None)
def test_weighted_sum_is_the_mean_however_it_is_split(lengths, split, aggregation):
    rng = np.random.default_rng(len(lengths))
    losses = [rng.normal(size=length) for length in lengths]
    totals = {"total_tokens": sum(lengths), "total_sequences": len(lengths)}
    weights = [
        weight for part in (lengths[:split], lengths[split:]) for weight in token_weights(part, aggregation, **totals)
    ]
    expected = np.concatenate(losses).mean() if aggregation == "token" else np.mean([loss.mean() for loss in losses])
    actual = sum(float(weight @ loss) for weight, loss in zip(weights, losses, strict=True))
    assert actual == pytest.approx(expected, abs=1e-13)
    assert sum(weight.sum() for weight in weights) == pytest.approx(1.0, abs=1e-12)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(0, 20))
@settings(deadline=None)
def test_a_constant_is_the_same_for_every_token_however_it_is_split(lengths, split):
    totals = {"total_tokens": sum(lengths), "total_sequences": len(lengths), "max_tokens": 64}
    parts = [token_weights(part, "constant", **totals) for part in (lengths[:split], lengths[split:])]
    assert [len(weight) for part in parts for weight in part] == lengths
    assert {value for part in parts for weight in part for value in weight} <= {1 / (64 * len(lengths))}


def test_a_constant_needs_the_limit():
    with pytest.raises(AssertionError, match="token limit"):
        token_weights([1], "constant", total_tokens=1, total_sequences=1)


def test_response_without_tokens_has_no_weights():
    assert [weight.size for weight in token_weights([0, 2], "sequence", total_tokens=2, total_sequences=2)] == [0, 2]


def test_counts_of_a_part_are_refused():
    with pytest.raises(AssertionError, match="whole mini-batch"):
        token_weights([5, 5], "token", total_tokens=5, total_sequences=2)
