"""Means over seeds, their intervals, and differences in pairs."""

from __future__ import annotations

import math

import pytest

from perl_megatron.sweep.intervals import MeanInterval, paired_difference


def test_the_interval_is_students() -> None:
    # 0.1 / √3 times the quantile 4.303 of two degrees of freedom.
    interval = MeanInterval.of([0.6, 0.8, 0.7])
    assert interval.mean == pytest.approx(0.7)
    assert interval.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert MeanInterval.of([0.6]).finite_half_width is None
    assert MeanInterval.of([0.5] * 100).half_width == 0


def test_a_difference_is_known_better_than_its_sides() -> None:
    """Seeds far apart whose difference is the same; one that only one side has does not count."""
    gap = paired_difference({"0": 0.65, "1": 0.85}, {"0": 0.6, "1": 0.8, "2": 0.1})
    assert gap is not None
    assert gap.mean == pytest.approx(0.05)
    assert gap.half_width == pytest.approx(0, abs=1e-12)
    assert paired_difference({"0": 1.0}, {"1": 1.0}) is None
