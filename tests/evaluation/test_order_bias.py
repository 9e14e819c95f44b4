"""Accuracy and flip rate: a table worked out by hand, the corner cases, a brute-force transcription."""

import json
from itertools import permutations

import numpy as np
import pytest

from perl_megatron.evaluation.order_bias import Rates, ViewOutcome, order_bias

IDENTITY, SWAPPED = (0, 1), (1, 0)


def outcome(record, order, correct, kind="find", slot=None):
    return ViewOutcome(record_id=record, kind=kind, order=order, correct=correct, slot=slot)


TABLE = [
    outcome("a", IDENTITY, True, slot=0),
    outcome("a", SWAPPED, False, slot=1),  # a flips
    outcome("b", IDENTITY, True, slot=1),
    outcome("b", SWAPPED, True, slot=0),
    outcome("c", IDENTITY, False, "sum"),
    outcome("c", SWAPPED, False, "sum"),  # always wrong is no flip
    outcome("d", IDENTITY, True, "sum"),  # one order: cannot flip
]


def test_by_hand():
    bias = order_bias(TABLE)
    assert bias.overall == Rates(accuracy=4 / 7, flip_rate=1 / 3, num_records=4, num_compared=3, num_views=7)
    assert (bias.accuracy, bias.flip_rate) == (4 / 7, 1 / 3)
    assert bias.by_kind == {
        "find": Rates(accuracy=3 / 4, flip_rate=1 / 2, num_records=2, num_compared=2, num_views=4),
        "sum": Rates(accuracy=1 / 3, flip_rate=0.0, num_records=2, num_compared=1, num_views=3),
    }
    assert bias.accuracy_by_slot == {0: 1.0, 1: 1 / 2}


def test_order_of_rows_does_not_matter():
    assert order_bias(reversed(TABLE)) == order_bias(TABLE)


def test_nothing_to_compare_is_no_flip():
    bias = order_bias([outcome("a", IDENTITY, True), outcome("b", IDENTITY, False)])
    assert (bias.flip_rate, bias.overall.num_compared) == (0.0, 0)


def test_to_dict_is_json():
    values = json.loads(json.dumps(order_bias(TABLE).to_dict()))
    assert values["overall"]["num_views"] == 7
    assert values["accuracy_by_slot"] == {"0": 1.0, "1": 0.5}


def test_same_order_twice_is_refused():
    with pytest.raises(AssertionError, match="twice in the same order"):
        order_bias([outcome("a", IDENTITY, True), outcome("a", IDENTITY, False)])


def test_empty_table_is_refused():
    with pytest.raises(AssertionError, match="no outcomes"):
        order_bias([])


def test_against_a_correctness_matrix():
    correct = np.random.default_rng(0).random((50, 6)) < 0.8
    orders = list(permutations(range(3)))
    bias = order_bias(
        outcome(str(record), order, bool(correct[record, column]))
        for record in range(50)
        for column, order in enumerate(orders)
    )
    assert bias.accuracy == pytest.approx(correct.mean(), abs=1e-15)
    assert bias.flip_rate == pytest.approx((correct.any(1) & ~correct.all(1)).mean(), abs=1e-15)
