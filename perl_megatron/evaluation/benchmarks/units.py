"""Units at the end of mathematical answers: '12 cm^2', '2\\sqrt{3}\\text{ m}', '5km', '30°'."""

from __future__ import annotations

import re
from dataclasses import dataclass

from perl_megatron.reward.quantities import Unit, read_known_unit

_UPRIGHT = re.compile(r"(?<=[0-9}])(?=\\(?:text|mathrm|textrm|operatorname)\s*\{)")
_END_OF_NUMBER = re.compile(r"(?<=[0-9})])(?=[^0-9})])")
_VARIABLE_AT_END = re.compile(r"(?<=[0-9}])\s?([A-Za-z])\Z")
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


def set_apart(text: str) -> str:
    r"""``text`` with a space before upright text, which 'plain' would join to the number: '3\text{m}' is '3 m'."""
    return _UPRIGHT.sub(" ", text)


def split_unit(text: str, *, attached: bool = False) -> Measured:
    """The expression before the known unit at the end of ``text``, and that unit.

    Args:
        text: an answer without LaTeX's text commands (``set_apart`` goes before).
        attached: whether one letter right after the number is a unit too. Otherwise '3m' and '2n' are products.
    """
    for match in _END_OF_NUMBER.finditer(text, max(0, len(text) - MAX_UNIT)):
        rest = text[match.end() :]
        is_apart = attached or rest[0].isspace()
        unit = read_known_unit(_POWER.sub("^", rest), apart=is_apart, others=_COUNTED)
        if unit is not None:
            return Measured(text[: match.end()].strip(), unit)
    return Measured(text, None)


def guard_variable(text: str) -> str:
    """``text`` with a variable at its end in braces, where math-verify would take it for a unit and drop it: '3m'."""
    return _VARIABLE_AT_END.sub(r"{\1}", text)
