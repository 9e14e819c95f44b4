"""Grading by answer type, and the refusal of records that could never be answered."""

import pytest

from perl_megatron.errors import UserError
from perl_megatron.reward.grade import check_expected, is_right


@pytest.mark.parametrize(
    ("answer_type", "expected", "given", "right"),
    [
        ("choice", "B", "(b)", True),
        ("choice", "B", "A", False),
        ("choice", "B", "", False),
        ("number", "1234.5", "1,234.50", True),
        ("number", "50%", "50", False),
        ("number", "7", "7.0000000000000000000001", False),
        ("ordering", "3, 1, 2", "image 3 > image 1 > image 2", True),
        ("ordering", "3, 1, 2", "3, 2, 1", False),
        ("ordering", "3, 1, 2", "3, 1", False),
        ("index", "2", "image 2", True),
        ("index", "2", "image 3", False),
        ("text", "Red ball", "red  BALL", True),
        ("text", "Red ball", "blue ball", False),
    ],
)
def test_is_right(answer_type, expected, given, right):
    assert is_right(given, expected, answer_type, where="record r") is right


def test_two_unreadable_answers_are_not_equal():
    with pytest.raises(UserError, match="cannot be read as 'number'"):
        is_right("many", "many", "number", where="record r")


@pytest.mark.parametrize(
    ("expected", "answer_type", "message"),
    [
        ("AB", "choice", "'AB' cannot be read as 'choice'"),
        ("", "text", "cannot be read as 'text'"),
        ("", "math", "cannot be read as 'math'"),
        ("1" * 2000, "number", "cannot be read as 'number'"),
        ("1", "sum", "answer type 'sum' is unknown"),
    ],
)
def test_bad_record_is_named(expected, answer_type, message):
    with pytest.raises(UserError, match=message) as error:
        check_expected(expected, answer_type, where="train.jsonl:7")
    assert error.value.where == "train.jsonl:7"


@pytest.mark.parametrize("answer_type", ["choice", "number", "index", "ordering", "text", "math"])
def test_overlong_answer_is_wrong(answer_type):
    assert is_right("1" * 1_000_000, "1" if answer_type != "choice" else "A", answer_type, where="r") is False
