"""Mathematical answers, and the units at their end: '12 cm^2', '2\\sqrt{3}\\text{ m}', '5km', '30°'."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from perl_megatron.evaluation.benchmarks.extraction import MAX_LENGTH, fold
from perl_megatron.reward.answers import plain, read_number
from perl_megatron.reward.quantities import Unit, read_known_unit

Maths = Callable[[str, str], bool]
"""Decides whether two mathematical expressions, (expected, given), are equal."""

_FRACTION_DEGREE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?")
_UPRIGHT = re.compile(r"(?:(?<=[0-9}])|(?<=\\pi))(?=\\(?:text|mathrm|textrm|operatorname)\s*\{)")
_END_OF_NUMBER = re.compile(r"(?<=[0-9})π])(?=[^0-9})])|(?<=\\pi)(?=\s)")
_VARIABLE_AT_END = re.compile(r"(?<=[0-9}\s])([A-Za-z])\Z")
_POWER = re.compile(r"\s*\^\s*")
_COUNTED = frozenset({"unit", "people", "person", "time"})
"""Words without plural s that may be left out like units."""
MAX_UNIT = 100
"""Characters at the end of an answer in which its unit is looked for."""


@dataclass(frozen=True)
class Measured:
    """An expression and its unit."""

    expression: str
    unit: Unit | None
    """None where the answer names no known unit."""


def math_same(expected: str, given: str, maths: Maths) -> bool:
    """Mathematically equal, in the same unit or in one that converts exactly; either may leave the unit out."""
    expected, given = (tidy(_set_apart(text[:MAX_LENGTH]), degree=True) for text in (expected, given))
    if not given:
        return False
    if fold(expected) == fold(given):
        return True
    wanted = split_unit(expected)
    got = split_unit(given, attached=wanted.unit is not None)
    if got.unit is not None:
        wanted = split_unit(expected, attached=True)
    if wanted.unit is not None and got.unit is not None:  # math-verify does not look at units: 3 m is not 3 cm
        if wanted.unit == got.unit:
            return maths(wanted.expression, got.expression)
        numbers = read_number(wanted.expression), read_number(got.expression)
        if wanted.unit.dimensions != got.unit.dimensions or numbers[0] is None or numbers[1] is None:
            return False
        return numbers[0] * wanted.unit.factor == numbers[1] * got.unit.factor
    if wanted.unit is None and got.unit is None:
        return maths(_guard_variable(expected), _guard_variable(given))
    return maths(expected, given) or maths(wanted.expression, got.expression)


def split_unit(text: str, *, attached: bool = False) -> Measured:
    """The expression before the known unit at the end of ``text``, and that unit.

    Args:
        text: an answer without LaTeX's text commands (``_set_apart`` goes before).
        attached: whether one letter right after the number is a unit too. Otherwise '3m' and '2n' are products.
    """
    for match in _END_OF_NUMBER.finditer(text, max(0, len(text) - MAX_UNIT)):
        rest = text[match.end() :]
        is_after_command = text[: match.end()].endswith("\\pi")  # whose space does not set anything apart
        is_apart = attached or (rest[0].isspace() and not is_after_command)
        unit = read_known_unit(_POWER.sub("^", rest), apart=is_apart, others=_COUNTED)
        if unit is not None:
            return Measured(text[: match.end()].strip(), unit)
    return Measured(text, None)


def tidy(text: str, *, degree: bool = False) -> str:
    """Without dollar signs, thin spaces, text commands, a final full stop and (unless ``degree``) degree sign."""
    text = plain(text[:MAX_LENGTH])
    text = _FRACTION_DEGREE.sub("°", text).replace("\\$", "").replace("$", "").replace("\\%", "%")
    text = re.sub(r"\\[,!;:]|~|\\qquad|\\quad", " ", text).strip().rstrip(".。").strip()
    return text if degree else text.removesuffix("°")


def _set_apart(text: str) -> str:
    r"""``text`` with a space before upright text, which 'plain' would join to the number: '3\text{m}' is '3 m'."""
    return _UPRIGHT.sub(" ", text)


def _guard_variable(text: str) -> str:
    """``text`` with a variable at its end in braces, where math-verify would take it for a unit and drop it: '3m'."""
    return _VARIABLE_AT_END.sub(r"{\1}", text)
