"""Grading: is the given answer the expected one, for an answer of this type?"""

from __future__ import annotations

from collections.abc import Callable

from perl_megatron.errors import UserError
from perl_megatron.reward.answers import MAX_LENGTH, read_choice, read_index, read_number, read_ordering, read_text
from perl_megatron.reward.math_equivalence import math_equal

READERS: dict[str, Callable[[str], object | None]] = {
    "choice": read_choice,
    "number": read_number,
    "index": read_index,
    "ordering": read_ordering,
    "text": read_text,
}
"""Answer types that are read into a value and compared exactly; 'math' is the one other type."""


def is_right(given: str, expected: str, answer_type: str, *, where: str) -> bool:
    """Whether ``given``, the content of a box, equals ``expected``.

    Args:
        given: what the model answered; anything at all. What cannot be read is wrong.
        expected: the record's answer.
        answer_type: 'choice', 'number', 'index', 'ordering', 'text' or 'math'.
        where: the record, for the error message.

    Raises:
        UserError: the answer type is unknown, or ``expected`` is not of that type.
    """
    check_expected(expected, answer_type, where=where)
    if len(given) > MAX_LENGTH:
        return False
    if answer_type == "math":
        return math_equal(expected, given)
    reader = READERS[answer_type]
    return reader(given) == reader(expected)


def check_expected(expected: str, answer_type: str, *, where: str) -> None:
    """Refuse a record whose answer could never be matched.

    Raises:
        UserError: the answer type is unknown, or ``expected`` is not of that type.
    """
    if answer_type != "math" and answer_type not in READERS:
        raise UserError(
            f"answer type {answer_type!r} is unknown", where=where, fix=f"use one of {[*sorted(READERS), 'math']}"
        )
    readable = answer_type == "math" or READERS[answer_type](expected[: MAX_LENGTH + 1]) is not None
    if len(expected) > MAX_LENGTH or not expected.strip() or not readable:
        raise UserError(
            f"the answer {expected[:80]!r} cannot be read as {answer_type!r}",
            where=where,
            fix="mend the record's answer or its answer_type",
        )
