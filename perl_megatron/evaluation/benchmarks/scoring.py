"""Scorers of benchmarks: whether a prediction is the expected answer. What cannot be read is wrong.

Each scorer gives back what it read (for the record of raw outputs) and the verdict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from perl_megatron.evaluation.benchmarks.extraction import (
    Prediction,
    after_thinking,
    all_boxed,
    fold,
    predict,
    read_option,
)
from perl_megatron.evaluation.benchmarks.item import Item
from perl_megatron.evaluation.benchmarks.math_answers import Maths, math_same, split_unit, tidy
from perl_megatron.reward.answers import read_number
from perl_megatron.reward.math_equivalence import compare_all, math_equal
from perl_megatron.reward.scorer import MAX_AT_ONCE
from perl_megatron.runtime.environment import cores_of_this_process

SCORE_VERSION = 2
"""Raised when a verdict can change; raw outputs of an older version are scored again."""

_NUMBER = re.compile(
    r"(?<![\w.^*])(?<![0-9],)[-+−]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))(?:\s*/\s*[0-9]+)?"
    r"(?![0-9]|[.,][0-9]|\s?[\^*])"
)
_STEP = re.compile(r"(?:^|(?<=[\s;；.。,，、}]))[(（]\s*([1-9])\s*[)）]")


@dataclass(frozen=True)
class Verdict:
    """What was read from a response, and whether it is right."""

    prediction: str | None
    """None where nothing could be read."""
    correct: bool


def score(response: str, item: Item, *, maths: Maths = math_equal) -> Verdict:
    """The verdict on a response to ``item``."""
    if item.scorer in MATH_SCORERS:
        return MATH_SCORERS[item.scorer](response, item, maths)
    return SCORERS[item.scorer](response, item)


def score_all(answers: Sequence[tuple[str, Item]]) -> list[Verdict]:
    """``score`` of many (response, item): their mathematics is compared side by side, within a common bound.

    The bound is that of ``reward.math_equivalence.compare_all``, as for the answers of a training step.
    """
    pairs: list[tuple[str, str]] = []

    def collect(expected: str, given: str) -> bool:
        pairs.append((expected, given))
        return False  # so that what is compared next where this is not equal is collected too

    for response, item in answers:
        if item.scorer in MATH_SCORERS:
            score(response, item, maths=collect)
    equal = compare_all(pairs, at_once=min(MAX_AT_ONCE, cores_of_this_process()))
    return [score(response, item, maths=lambda wanted, given: equal[wanted, given]) for response, item in answers]


def score_choice(response: str, item: Item) -> Verdict:
    """The letter of the expected option, or that option's text."""
    prediction, options = predict(response), item.record.grading.options
    letter = None if prediction is None else read_option(prediction.text, options)
    if letter is None and prediction is not None and prediction.source != "box":
        letter = read_option(prediction.value(), options)
    if letter is None:
        return _unread(prediction)
    return Verdict(letter, letter == item.record.answer)


def score_text(response: str, item: Item) -> Verdict:
    """The same text, case and space aside."""
    prediction = predict(response)
    if prediction is None:
        return _unread(prediction)
    texts = (prediction.text, prediction.value())
    return Verdict(texts[1], fold(item.record.answer) in {fold(text) for text in texts})


def score_integer(response: str, item: Item) -> Verdict:
    """The same whole number: '3', '3.0' and '3 cm' are 3, 3.7 is not."""
    return _compare_numbers(response, item, lambda given, expected: given == expected)


def score_float(response: str, item: Item) -> Verdict:
    """The same number after both are rounded to ``item.precision`` decimals, with ``round`` as in MathVista."""
    decimals = item.precision
    if decimals is None:
        decimals = len(item.record.answer.strip().partition(".")[2])

    def same(given: Fraction, expected: Fraction) -> bool:
        try:
            return round(float(given), decimals) == round(float(expected), decimals)
        except OverflowError:
            return False

    return _compare_numbers(response, item, same)


def score_list(response: str, item: Item) -> Verdict:
    """The same elements in the same order; brackets and quotation marks do not count, and numbers have values."""
    prediction = predict(response)
    given = None if prediction is None else _elements(prediction.value())
    if not given:
        return _unread(prediction)
    return Verdict(", ".join(map(str, given)), given == _elements(item.record.answer))


def score_one_of(response: str, item: Item) -> Verdict:
    """One of the expected answer's elements, which commas separate."""
    text = _answer_text(response)
    if text is None:
        return Verdict(None, False)
    accepted = [part for part in item.record.answer.split(",") if part.strip()]
    return Verdict(text, any(_same_value(part, text) for part in accepted))


def score_tolerant(response: str, item: Item) -> Verdict:
    """A number within the record's tolerances; where the expected answer is no mere number, the same text."""
    text, grading = _answer_text(response), item.record.grading
    if text is None:
        return Verdict(None, False)
    given, expected = number_in(text), read_number(tidy(item.record.answer).replace("%", ""))
    if given is not None and expected is not None:
        relative, absolute = (
            Fraction(str(bound)) for bound in (grading.relative_tolerance, grading.absolute_tolerance)
        )
        return Verdict(text, abs(given - expected) <= max(absolute, relative * abs(expected)))
    return Verdict(text, _same_value(item.record.answer, text))


def score_math(response: str, item: Item, maths: Maths) -> Verdict:
    """Mathematically equal, as math-verify sees it; a unit may be left out."""
    prediction = predict(response)
    if prediction is None:
        return _unread(prediction)
    given = prediction.value()
    return Verdict(given, math_same(item.record.answer, given, maths))


def score_choice_or_math(response: str, item: Item, maths: Maths) -> Verdict:
    """By letter or option text where the record has options, else by mathematical equality."""
    return score_choice(response, item) if item.record.grading.options else score_math(response, item, maths)


def score_steps(response: str, item: Item, maths: Maths) -> Verdict:
    """Every step's answer mathematically equal, and as many steps as expected.

    The steps of a response are the parts '(1) …', '(2) …' of its prediction, where there are as many as steps; else
    the boxes after its thinking, where there are.
    """
    expected = steps_of(item.record.answer)
    boxes, prediction = all_boxed(after_thinking(response)), predict(response)
    if prediction is None:
        return _unread(prediction)
    given = steps_of(prediction.text)
    if len(given) != len(expected) == len(boxes):
        given = boxes
    if len(given) != len(expected):
        return Verdict(" ; ".join(given), False)
    # All are compared, also after a wrong one: ``score_all`` collects them.
    same = [math_same(wanted, got, maths) for wanted, got in zip(expected, given, strict=True)]
    return Verdict(" ; ".join(given), all(same))


SCORERS: dict[str, Callable[[str, Item], Verdict]] = {
    "choice": score_choice,
    "text": score_text,
    "integer": score_integer,
    "float": score_float,
    "list": score_list,
    "one_of": score_one_of,
    "tolerant": score_tolerant,
}
MATH_SCORERS: dict[str, Callable[[str, Item, Maths], Verdict]] = {
    "math": score_math,
    "choice_or_math": score_choice_or_math,
    "steps": score_steps,
}


def number_in(text: str) -> Fraction | None:
    """The one number of a text, with or without unit: '12 cm', '$1,200', 'x = 5', '50%' (50).

    None for a text without a number or with several ('3 or 4').
    """
    text = tidy(text).replace("%", "")
    for whole in (text, split_unit(text, attached=True).expression):
        number = read_number(whole)
        if number is not None:
            return number
    found = [match.group() for match in _NUMBER.finditer(text) if match.group()]
    return read_number(found[0]) if len(found) == 1 else None


def steps_of(answer: str) -> list[str]:
    """The parts of '(1) …; (2) …'; one part where there is no such list."""
    marks: list[re.Match[str]] = []
    for mark in _STEP.finditer(answer):
        if int(mark[1]) == len(marks) + 1:
            marks.append(mark)
    if len(marks) < 2:
        return [answer[marks[0].end() if marks else 0 :].strip(_EDGE)]
    ends = [*(mark.start() for mark in marks[1:]), len(answer)]
    return [answer[mark.end() : end].strip(_EDGE) for mark, end in zip(marks, ends, strict=True)]


_EDGE = " \t\r\n;；.。,，、"


def _unread(prediction: Prediction | None) -> Verdict:
    return Verdict(None if prediction is None else prediction.value(), False)


def _compare_numbers(response: str, item: Item, same: Callable[[Fraction, Fraction], bool]) -> Verdict:
    prediction = predict(response)
    given = None if prediction is None else number_in(prediction.value())
    expected = number_in(item.record.answer)
    if given is None or expected is None:
        return _unread(prediction)
    assert prediction is not None
    return Verdict(prediction.value(), same(given, expected))


def _answer_text(response: str) -> str | None:
    """The prediction's value, or the field 'answer' of a JSON object, which ReMI's own prompts ask for."""
    text = after_thinking(response)
    start, end = text.find("{"), text.rfind("}")
    if 0 <= start < end and '"answer"' in text:
        try:
            return str(json.loads(text[start : end + 1])["answer"])[:2000]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
    prediction = predict(response)
    return None if prediction is None else prediction.value()


def _same_value(expected: str, given: str) -> bool:
    """Equal as numbers (a percent sign does not count), or as texts without spaces and outer brackets."""
    numbers = [read_number(tidy(text).replace("%", "")) for text in (expected, given)]
    if None not in numbers:
        return numbers[0] == numbers[1]

    def bare(text: str) -> str:
        text = fold(text).replace("\\", "").replace(" ", "").partition("%")[0]
        text = re.sub(r"^([fgh])\(x\)$", r"\1", text)
        return text[1:-1] if text.startswith("(") and text.endswith(")") else text

    return bool(bare(given)) and bare(expected) == bare(given)


def _elements(text: str) -> list[Fraction | str]:
    parts = re.split(r"[,;]", tidy(text).strip("[](){} "))
    values: list[Fraction | str] = []
    for part in parts:
        bare = part.strip().strip("'\"").strip()
        number = read_number(bare)
        values.append(fold(bare) if number is None else number)
    return values if any(value != "" for value in values) else []
