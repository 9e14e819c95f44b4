"""JSON answers: found, read within bounds, compared by structure."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from growth import is_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.reward.closeness import Tolerance, tolerance_of
from perl_megatron.reward.json_answers import MAX_DEPTH, MAX_LENGTH, last_fenced_block, read_json, same_json
from perl_megatron.types import Grading

EXACT = tolerance_of(Grading())


def agree(given: str, expected: str, tolerance: Tolerance = EXACT) -> bool:
    mine, other = read_json(given), read_json(expected)
    return mine is not None and other is not None and same_json(mine.value, other.value, tolerance)


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b":[1,2],"a":1}', True),
        ("[1, 2]", "[2, 1]", False),
        ("1.0", "1", True),
        ("1e2", "100", True),
        ("0.1", "0.10000000000000000001", False),
        ("true", "1", False),
        ("1", "true", False),
        ("null", "null", True),
        ("null", "false", False),
        ('"1"', "1", False),
        ('"red"', '"Red"', False),
        ('{"a": 1}', '{"a": 1, "b": 2}', False),
        ('{"a": 1, "b": 2}', '{"a": 1}', False),
        ("[1]", "[1, 1]", False),
        ('\\{"a": 1\\}', '{"a": 1}', True),
        ('```json\n{"a": 1}\n```', '{"a": 1}', True),
        ('"\\u00e9"', '"é"', True),
    ],
)
def test_structure_decides(given, expected, same):
    assert agree(given, expected) is same


def test_numbers_within_the_tolerance_at_any_depth():
    tolerance = tolerance_of(Grading(absolute_tolerance=0.1))
    assert agree('{"a": [1.1]}', '{"a": [1]}', tolerance)
    assert not agree('{"a": [1.11]}', '{"a": [1]}', tolerance)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "{",
        "{'a': 1}",
        "NaN",
        "[Infinity]",
        '{"a": 1, "a": 1}',
        "1 2",
        "01",
        "1e9999",
        "1" * 2000,
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "[" * 100_000,
        "[" + "1," * MAX_LENGTH + "1]",
    ],
)
def test_no_answer(answer):
    assert read_json(answer) is None


def test_brackets_in_texts_are_not_depth():
    assert agree(json.dumps("[" * 100), json.dumps("[" * 100))
    assert agree(json.dumps('\\"' + "{" * 100), json.dumps('\\"' + "{" * 100))
    assert read_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


def test_last_closed_block():
    text = 'First\n```json\n{"a": 1}\n```\nno, rather\n```\n{"a": 2}\n```\nand\n```json\n{"a": 3}'
    assert last_fenced_block(text) == '{"a": 2}'
    assert last_fenced_block("```\n1") is None
    assert last_fenced_block("none") is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
@settings(deadline=None, max_examples=100)
def test_agreement_is_that_of_python_with_types(first, second):
    assert agree(json.dumps(first), json.dumps(first, indent=1, ensure_ascii=False))
    assert agree(json.dumps(first), json.dumps(second)) is (typed(first) == typed(second))


def typed(value):
    """Python takes True for 1, JSON does not."""
    if isinstance(value, list):
        return [typed(item) for item in value]
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Fraction(repr(value))
    return (type(value), value)


@pytest.mark.parametrize("piece", ["[", "{", '"', '\\"', '{"a":', "1", "-", "```\n", "```", "\\{", "e", "[]", ","])
def test_a_megabyte_is_no_stall(piece):
    def read(size):
        text = piece * (size // len(piece))
        read_json(text)
        read_json(text[: MAX_LENGTH * size // 1_000_000])
        last_fenced_block(text)

    assert is_linear(read, 1_000_000)
