"""Grading: is the given answer the expected one, for an answer of this type?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from perl_megatron.config.reward_section import AnswerType
from perl_megatron.errors import UserError
from perl_megatron.reward.answers import MAX_LENGTH, read_index, read_number, read_ordering, read_short_text, read_text
from perl_megatron.reward.boxed import last_boxed
from perl_megatron.reward.choices import read_option
from perl_megatron.reward.closeness import tolerance_of
from perl_megatron.reward.json_answers import JsonValue, last_fenced_block, read_json, same_json
from perl_megatron.reward.math_equivalence import is_tame, math_equal
from perl_megatron.reward.quantities import Quantity, read_quantity, read_unit
from perl_megatron.types import Grading, View

NO_GRADING = Grading()
ANSWER_TYPES: tuple[str, ...] = get_args(AnswerType)


_READERS: dict[str, Callable[[str], object | None]] = {
    "ordering": read_ordering,
    "short_text": read_short_text,
    "text": read_text,
}


@dataclass(frozen=True)
class Question:
    """What grading needs to know of a record or a view."""

    answer: str
    answer_type: str
    where: str
    """For error messages."""
    grading: Grading = NO_GRADING
    option_slots: tuple[int | None, ...] = ()
    """As in ``View``."""
    num_images: int = 0


def question_of(view: View) -> Question:
    """What a view asks: its own answer, in its own image order."""
    return Question(
        view.answer, view.answer_type, f"record {view.record_id}", view.grading, view.option_slots, len(view.images)
    )


def final_answer(text: str, answer_type: str) -> str | None:
    r"""What a response gives as its answer: the content of its last balanced ``\boxed{…}``, or None.

    JSON may also stand in a fenced block (the last one), where no box holds any: a brace inside a text of the JSON can
    unbalance a box.
    """
    boxed = last_boxed(text)
    if answer_type != "json" or (boxed is not None and read_json(boxed) is not None):
        return boxed
    block = last_fenced_block(text)
    return boxed if block is None else block


def read_answer(answer: str, question: Question) -> object | None:
    """The answer as a value of the question's type, or None: 'unparsable', whatever would have been right.

    Cheap: no type starts a process. A mathematical expression is its own value; that it can be parsed is found out when
    it is compared.
    """
    grading = question.grading
    match question.answer_type:
        case "choice":
            return read_option(
                answer,
                options=grading.options,
                option_slots=question.option_slots,
                num_images=question.num_images,
            )
        case "number":
            return read_quantity(answer) if grading.unit else read_number(answer)
        case "index":
            return read_index(answer, question.num_images)
        case "math":
            return answer if answer.strip() and is_tame(answer) else None
        case "json":
            return read_json(answer)
    return _READERS[question.answer_type](answer)


def is_right(
    given: str,
    expected: str,
    answer_type: str,
    *,
    where: str,
    grading: Grading = NO_GRADING,
    option_slots: tuple[int | None, ...] = (),
    num_images: int = 0,
) -> bool:
    """Whether ``given``, the content of a box, equals ``expected``: ``answers`` for a question in its parts."""
    return answers(given, Question(expected, answer_type, where, grading, option_slots, num_images))


def answers(given: str, question: Question, *, maths: Callable[[str, str], bool] = math_equal) -> bool:
    """Whether ``given`` is the answer of the question.

    Args:
        given: what the model answered; anything at all. What cannot be read is wrong.
        question: the question, its expected answer, and how that is graded.
        maths: decides whether two mathematical expressions, (expected, given), are equal.

    Raises:
        UserError: the answer type is unknown, or the expected answer is not of that type.
    """
    expected = _read_expected(question)
    if question.answer_type == "math":
        return len(given) <= MAX_LENGTH and maths(question.answer, given)
    value = read_answer(given, question)
    return value is not None and _agrees(value, expected, question.grading)


def check_expected(
    expected: str,
    answer_type: str,
    *,
    where: str,
    grading: Grading = NO_GRADING,
    option_slots: tuple[int | None, ...] = (),
    num_images: int = 0,
) -> None:
    """Refuse a record whose answer could never be matched.

    Raises:
        UserError: the answer type is unknown, ``expected`` is not of that type or names an option that does not exist,
            or the record's unit cannot be read.
    """
    _read_expected(Question(expected, answer_type, where, grading, option_slots, num_images))


def _agrees(value: object, expected: object, grading: Grading) -> bool:
    """Whether two values of one type are the same answer."""
    tolerance = tolerance_of(grading)
    if isinstance(value, Quantity) and isinstance(expected, Quantity):
        unit = read_unit(grading.unit)
        assert unit is not None
        given, wanted = value.in_unit(unit), expected.in_unit(unit)
        return given is not None and wanted is not None and tolerance.allows(given, wanted)
    if isinstance(value, JsonValue) and isinstance(expected, JsonValue):
        return same_json(value.value, expected.value, tolerance)
    if isinstance(value, Fraction) and isinstance(expected, Fraction):
        return tolerance.allows(value, expected)
    return value == expected


def _read_expected(question: Question) -> object:
    if question.answer_type not in ANSWER_TYPES:
        raise UserError(
            f"answer type {question.answer_type!r} is unknown",
            where=question.where,
            fix=f"use one of {list(ANSWER_TYPES)}",
        )
    expected = _expected_value(question)
    if expected is None:
        raise UserError(
            f"the answer {question.answer[:80]!r} cannot be read as {question.answer_type!r}",
            where=question.where,
            fix="mend the record's answer or its answer_type",
        )
    options = question.grading.options or question.option_slots
    if question.answer_type == "choice" and options and isinstance(expected, int) and expected >= len(options):
        raise UserError(
            f"the answer {question.answer[:80]!r} names none of the {len(options)} options",
            where=question.where,
            fix="mend the record's answer or its options",
        )
    return expected


def _expected_value(question: Question) -> object | None:
    """The record's answer as a value; None where it could never be matched."""
    if question.answer_type == "math":  # equal texts are equal, however wild they are
        return question.answer if question.answer.strip() and len(question.answer) <= MAX_LENGTH else None
    unit = question.grading.unit
    if question.answer_type != "number" or not unit:
        return read_answer(question.answer, question)
    wanted = read_unit(unit)
    if wanted is None:
        raise UserError(
            f"the unit {unit!r} cannot be read",
            where=question.where,
            fix="write one such as 'cm', 'm/s^2' or 'apples' as `grading.unit`",
        )
    quantity = read_quantity(question.answer)
    return quantity if quantity is not None and quantity.in_unit(wanted) is not None else None
