import numpy as np
import pytest

from perl_megatron.triage.gaps import MULTIPLE, Side, Tolerance, explains, gap, where_it_begins

NAN, INF = np.nan, np.inf


def test_the_gap_is_to_the_nearest_alternative():
    recorded = np.array([-1.0, -2.0, -3.0])
    reference = np.array([[-1.5, -1.1, -INF], [-INF, -INF, -INF], [-3.0, -INF, -4.0]])
    assert gap(recorded, reference) == pytest.approx([0.1, INF, 0.0])


def test_what_is_not_finite_is_infinitely_far_and_what_is_not_known_is_left_open():
    reference = np.array([[-1.0], [NAN], [-1.0]])
    assert np.array_equal(gap(np.array([NAN, -1.0, -1.5]), reference), [INF, NAN, 0.5], equal_nan=True)


def test_tolerances_are_multiples_of_rounding():
    tolerance = Tolerance([np.array([1.0, 5.0]), np.array([3.0, INF, 1.0])], largest=0.0)
    assert tolerance.largest() == MULTIPLE * 5
    assert tolerance.mean(2) == MULTIPLE * 4  # 5 and 3 stand side by side
    assert tolerance.mean() == MULTIPLE * 2.5
    assert tolerance.mean(100) == tolerance.mean()


def test_the_floor_is_a_unit_in_the_last_place():
    tolerance = Tolerance([np.zeros(3)], largest=8.0)
    assert tolerance.largest() == tolerance.mean() == 8 * np.finfo(np.float32).eps
    assert Tolerance([np.array([INF])], largest=8.0).mean() == 8 * np.finfo(np.float32).eps


def test_largest_and_mean_have_to_hold():
    tolerance = Tolerance([np.array([0.0] * 10 + [1.0] + [0.0] * 10)], largest=0.0)
    assert tolerance.holds(np.array([3.9, 0, 0, 0]))
    assert not tolerance.holds(np.array([4.1, 0, 0, 0]))
    assert not tolerance.holds(np.array([1.5, 1.5, 1.5, 1.5]))
    assert tolerance.holds(np.array([NAN, 1.0]))
    assert not tolerance.holds(np.array([NAN, NAN]))
    assert not tolerance.holds(np.array([INF, 0.0]))


def test_an_explanation_has_to_take_half_the_gap_away():
    tolerance = Tolerance([np.ones(4)], largest=0.0)
    assert explains(tolerance, np.full(4, 2.0), np.full(4, 4.1))
    assert not explains(tolerance, np.full(4, 3.9), np.full(4, 4.1))
    assert not explains(tolerance, np.full(4, 5.0), np.full(4, 50.0))


def test_where_it_begins():
    tolerance = Tolerance([np.ones(3)], largest=0.0)
    sides = [
        Side(2, False, np.zeros(3), mismatched=False),
        Side(2, True, np.array([0.0, 9.0, 9.0]), mismatched=True),
        Side(3, True, np.array([9.0, 0.0, 0.0]), mismatched=True),
    ]
    assert where_it_begins(sides, tolerance) == (
        "0 of 1 original views, 2 of 2 permuted views; 1 of 2 with 2 images, 1 of 1 with 3 images; "
        "the gap begins at the response's first token in 1 of 2, at token 1 at the latest"
    )
    assert where_it_begins(sides[:1], tolerance) == ""
    spread_out = [Side(2, True, np.full(3, 3.0), mismatched=True)]
    assert "no single token is beyond rounding" in where_it_begins(spread_out, tolerance)
