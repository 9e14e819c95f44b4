"""Resampling: a hand-computed case, the paper's numbers, and what holds for any questions and any histogram."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.errors import UserError
from perl_megatron.preparation.resample import apportion, bin_of, resample
from perl_megatron.preparation.settings import PAPER_HISTOGRAM


def test_a_case_by_hand():
    accuracies = [0.0] * 2 + [0.5] * 10 + [1.0] * 10
    result = resample(accuracies, (1, 2, 1), size=8)
    assert (result.available, result.counts, result.short) == ((2, 10, 10), (2, 4, 2), ())
    assert (result.mean_before, result.mean_after) == (15 / 22, 0.5)
    assert [accuracies[index] for index in result.chosen] == [0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1]
    # 12 would need 3, 6, 3; the two there are stay, and 10 are shared 2:1 (6.67, 3.33).
    result = resample(accuracies, (1, 2, 1), size=12)
    assert (result.counts, result.short) == ((2, 7, 3), (0,))
    assert resample(accuracies, (1, 2, 1)).counts == (2, 5, 2)  # 9 is 2.25, 4.5, 2.25; 10 would need a third
    result = resample(accuracies, (1, 2, 1), size=12, allow_repeats=True)
    assert (result.counts, result.short) == ((3, 6, 3), ())
    assert max(Counter(result.chosen).values()) == 2


def test_the_paper():
    """From a mean of 0.78 to 0.38, with the histogram of its figure."""
    random = np.random.default_rng(0)
    accuracies = [round(float(value), 1) for value in random.beta(1.17, 0.33, size=60_000)]
    result = resample(accuracies, PAPER_HISTOGRAM)
    assert result.mean_before == pytest.approx(0.78, abs=0.01)
    assert result.mean_after == pytest.approx(0.38, abs=0.01)
    assert result.short == ()
    shares = np.array(result.counts) / sum(result.counts)
    assert np.abs(shares - np.array(PAPER_HISTOGRAM) / 100).max() < 0.001
    scarcest = min(count / share for count, share in zip(result.available, result.target, strict=True))
    assert sum(result.counts) == pytest.approx(scarcest, rel=0.002)


def test_accuracies_of_other_numbers_of_rollouts_go_to_the_nearest_bin():
    assert [bin_of(k / 4, 11) for k in range(5)] == [0, 3, 5, 8, 10]
    assert [bin_of(k / 10, 11) for k in range(11)] == list(range(11))
    assert [bin_of(k / 100, 3) for k in (24, 25, 74, 75)] == [0, 1, 1, 2]


def test_the_largest_remainders_are_rounded_up():
    assert apportion([Fraction(1, 3)] * 3, 4) == [2, 1, 1]
    assert apportion([Fraction(5, 10), Fraction(3, 10), Fraction(2, 10)], 7) == [4, 2, 1]


questions = st.lists(st.integers(0, 10).map(lambda k: k / 10), min_size=1, max_size=80)
histograms = st.lists(st.integers(0, 9), min_size=2, max_size=11).filter(any)
sizes = st.integers(1, 120)


def usable(accuracies: list[float], histogram: list[int]) -> bool:
    return any(histogram[bin_of(value, len(histogram))] for value in accuracies)


@settings(deadline=None, max_examples=100)
@given(questions, histograms, sizes, st.booleans(), st.integers(0, 5))
def test_any_choice(accuracies, histogram, size, allow_repeats, seed):
    if not usable(accuracies, histogram):
        with pytest.raises(UserError, match="no question has an accuracy"):
            resample(accuracies, histogram, size=size)
        return
    result = resample(accuracies, histogram, size=size, allow_repeats=allow_repeats, seed=seed)
    assert result == resample(accuracies, histogram, size=size, allow_repeats=allow_repeats, seed=seed)
    in_bins = Counter(bin_of(accuracies[index], len(histogram)) for index in result.chosen)
    assert [in_bins[number] for number in range(len(histogram))] == list(result.counts)
    assert list(result.chosen) == sorted(result.chosen)
    uses = Counter(result.chosen)
    assert all(histogram[number] for number in in_bins)
    if allow_repeats:
        assert sum(result.counts) == size
        for number in range(len(histogram)):  # every question of a bin is used before one is used again
            of_bin = [uses[k] for k, value in enumerate(accuracies) if bin_of(value, len(histogram)) == number]
            assert not of_bin or max(of_bin) - min(of_bin) <= 1
    else:
        reachable = sum(count for count, weight in zip(result.available, histogram, strict=True) if weight)
        assert sum(result.counts) == min(size, reachable)
        assert max(uses.values()) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=3, max_size=3), st.lists(st.integers(1, 5), min_size=3, max_size=3), sizes)
def test_no_choice_of_the_size_is_nearer(available, histogram, size):
    """Against all choices there are, by summed absolute differences."""
    accuracies = [number / 2 for number, count in enumerate(available) for _ in range(count)]
    size = min(size, sum(available))
    if size == 0:
        return
    quotas = [Fraction(weight * size, sum(histogram)) for weight in histogram]

    def distance(counts: tuple[int, ...]) -> Fraction:
        return sum((abs(count - quota) for count, quota in zip(counts, quotas, strict=True)), Fraction(0))

    every = [
        (a, b, size - a - b)
        for a in range(available[0] + 1)
        for b in range(available[1] + 1)
        if 0 <= size - a - b <= available[2]
    ]
    # Where bins are short, rounding the rest may cost less than one question's share more than the best.
    assert distance(resample(accuracies, histogram, size=size).counts) - min(map(distance, every)) < 2


@settings(deadline=None, max_examples=30)
@given(questions, histograms)
def test_the_largest_size_without_repeats(accuracies, histogram):
    if not usable(accuracies, histogram):
        return
    result = resample(accuracies, histogram)
    present = [weight if count else 0 for weight, count in zip(histogram, result.available, strict=True)]
    size = sum(result.counts)
    assert not [number for number in result.short if present[number]]
    for larger in range(size + 1, size + 30):
        assert resample(accuracies, present, size=larger).short or larger > len(accuracies)


@settings(deadline=None, max_examples=50)
@given(questions, histograms, sizes)
def test_a_larger_size_keeps_what_a_bin_had(accuracies, histogram, size):
    if not usable(accuracies, histogram):
        return
    smaller, larger = (resample(accuracies, histogram, size=each) for each in (size, size + 10))
    for number, (few, many) in enumerate(zip(smaller.counts, larger.counts, strict=True)):
        if few <= many:
            of_bin = [k for k in smaller.chosen if bin_of(accuracies[k], len(histogram)) == number]
            assert set(of_bin) <= set(larger.chosen)


def test_the_seed_decides():
    accuracies = [0.0] * 50 + [1.0] * 50
    assert resample(accuracies, (1, 1), size=20).chosen != resample(accuracies, (1, 1), size=20, seed=1).chosen


@pytest.mark.parametrize("histogram", [(), (1,), (0, 0), (1, -1), (1, float("nan")), (1, float("inf"))])
def test_what_is_no_histogram(histogram):
    with pytest.raises(UserError, match="is no histogram"):
        resample([0.5], histogram)


def test_nothing_to_choose_from():
    with pytest.raises(UserError, match="no question"):
        resample([], (1, 1))
