"""Importance weights: hand-computed cases of every mode, a literal transcription, and what they are there for."""

import math

import numpy as np
import pytest

from perl_megatron.algorithm.importance import bounded_weights, importance_ratio

ROLLOUT = np.log([0.5, 0.2, 0.4, 0.1]).astype(np.float32)
OLD = np.log([0.5, 0.3, 0.1, 0.4]).astype(np.float32)
"""Ratios of the tokens: 1, 1.5, 0.25, 4; their product is 1.5."""
BOUNDS = {"low": 0.5, "high": 2.0}


@pytest.mark.parametrize(
    ("level", "correction", "bounds", "weights"),
    [
        ("token", "truncated", BOUNDS, [1, 1.5, 0.25, 2]),
        ("token", "truncated", {"low": 0.5, "high": 1.0}, [1, 1, 0.25, 1]),
        ("token", "masked", BOUNDS, [1, 1.5, 0, 0]),
        ("token", "masked", {"low": 0.0, "high": 3.0}, [1, 1.5, 0.25, 0]),
        ("sequence", "truncated", BOUNDS, [1.5] * 4),
        ("sequence", "truncated", {"low": 0.5, "high": 1.2}, [1.2] * 4),
        ("sequence", "masked", BOUNDS, [1.5] * 4),
        ("sequence", "masked", {"low": 0.5, "high": 1.2}, [0] * 4),
    ],
)
def test_hand_computed(level, correction, bounds, weights):
    found = bounded_weights(importance_ratio(OLD, ROLLOUT, level), correction, **bounds)
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx(weights, rel=1e-6)


def transcription(old, rollout, level, correction, *, low, high):
    """The equations, one token after another."""
    weights = []
    for token in range(len(old)):
        ratio = np.exp(old[token]) / np.exp(rollout[token])
        if level == "sequence":
            ratio = np.prod(np.exp(old)) / np.prod(np.exp(rollout))
        if correction == "truncated":
            weights.append(ratio if ratio < high else high)
        else:
            weights.append(ratio if low <= ratio <= high else 0.0)
    return weights


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncated", "masked"])
def test_transcription(level, correction):
    random = np.random.default_rng(0)
    met = 0
    for length in [1, 2, 5, 9, 30, 40] * 5:
        rollout = random.normal(-1, 1, length)
        old = rollout + random.normal(0, 0.3, length)
        ratio = importance_ratio(old, rollout, level)
        found = bounded_weights(ratio, correction, **BOUNDS)
        expected = transcription(old, rollout, level, correction, **BOUNDS)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        met += (found != ratio).any()
    assert 0 < met < 30


def test_both_bounds_are_kept():
    assert bounded_weights(np.array([0.5, 2.0]), "masked", **BOUNDS).tolist() == [0.5, 2.0]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_and_empty_responses(level):
    far = importance_ratio(np.array([-1e4, 0.0], np.float32), np.array([0.0, -1e3], np.float32), level)
    assert np.isfinite(far).all()
    assert (far > 0).all()
    assert importance_ratio(np.zeros(0, np.float32), np.zeros(0, np.float32), level).shape == (0,)


def test_equal_log_probabilities_weigh_exactly_one():
    for level in ("token", "sequence"):
        for correction in ("truncated", "masked"):
            weights = bounded_weights(importance_ratio(OLD, OLD, level), correction, low=1.0, high=1.0)
            assert weights.tolist() == [1.0] * 4


def test_the_weight_of_the_response_makes_expectations_exact():
    """Over all responses of two tokens: the mean of a reward under π_old from samples of π_rollout."""
    random = np.random.default_rng(1)
    old, rollout = random.dirichlet(np.ones(3), 2), random.dirichlet(np.ones(3), 2)
    reward = random.normal(size=(3, 3))
    exact = weighted = 0.0
    for first in range(3):
        for second in range(3):
            log_old, log_rollout = (np.log([p[0, first], p[1, second]]) for p in (old, rollout))
            weights = bounded_weights(importance_ratio(log_old, log_rollout, "sequence"), "truncated", low=0, high=1e6)
            exact += math.exp(log_old.sum()) * reward[first, second]
            weighted += math.exp(log_rollout.sum()) * weights[0] * reward[first, second]
    assert weighted == pytest.approx(exact, rel=1e-12)
