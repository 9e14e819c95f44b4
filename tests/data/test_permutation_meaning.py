"""Permuted records keep their meaning: every view's answer is worked out afresh from its own text and images."""

from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from permutation_world import QUESTIONS, Question, shown

from perl_megatron.data.permutation import apply_order, invert, num_orders, validate_contract
from perl_megatron.types import Record, View

MAX_ORDERS = 24


def orders(record: Record, random: Random) -> list[tuple[int, ...]]:
    """All orders of the movable slots if there are few, else some."""
    movable = sorted(record.contract.movable)
    if num_orders(record) <= MAX_ORDERS:
        arrangements = [list(arrangement) for arrangement in permutations(movable)]
    else:
        arrangements = [random.sample(movable, len(movable)) for _ in range(MAX_ORDERS)]
    found = []
    for arrangement in arrangements:
        order = list(range(len(record.images)))
        for slot, old in zip(movable, arrangement, strict=True):
            order[slot] = old
        found.append(tuple(order))
    return found


def as_record(record: Record, view: View) -> Record:
    return replace(record, images=view.images, text=view.text, answer=view.answer, grading=view.grading)


def after(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """The order that gives in one step what ``first`` and then ``second`` give."""
    return tuple(first[old] for old in second)


@st.composite
def questions(draw, make) -> tuple[Question, Random]:
    random = Random(draw(st.integers(0, 10**6)))
    num_images = draw(st.sampled_from([2, 2, 3, 3, 4, 5, 12]))
    return make(random, random.sample(range(0, 120, 2), num_images)), random


@pytest.mark.parametrize("make", QUESTIONS, ids=lambda make: make.__name__)
def test_the_answer_of_every_order_is_right(make):
    @settings(max_examples=20, deadline=None)
    @given(questions(make))
    def check(drawn):
        question, random = drawn
        record = question.record
        validate_contract(record)
        for index, order in enumerate(orders(record, random)):
            view = apply_order(record, order, index)
            assert view.answer == question.solve(view.text, view.grading.options, shown(view.images)), view.text

    check()


@pytest.mark.parametrize("make", QUESTIONS, ids=lambda make: make.__name__)
def test_orders_undo_and_compose(make):
    @settings(max_examples=8, deadline=None)
    @given(questions(make))
    def check(drawn):
        question, random = drawn
        record = question.record
        known = orders(record, random)
        for first in random.sample(known, min(4, len(known))):
            moved = as_record(record, apply_order(record, first, 1))
            validate_contract(moved)
            for second in random.sample(known, min(4, len(known))):
                both, at_once = apply_order(moved, second, 2), apply_order(record, after(first, second), 2)
                # "The last image" does not come back as "last": where words can differ, a third view has to agree.
                assert (both.images, both.answer.lower()) == (
                    at_once.images,
                    at_once.answer.lower(),
                ) or "last" in record.text
                if "last" not in record.text:
                    assert (both.text, both.grading) == (at_once.text, at_once.grading)
            back = apply_order(moved, invert(first), 3)
            assert back.images == record.images
            if "last" not in record.text:
                assert (back.text, back.answer, back.grading) == (record.text, record.answer, record.grading)

    check()
