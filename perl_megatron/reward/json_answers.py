"""JSON answers: found in a response, read within bounds, compared by structure."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Any

from perl_megatron.reward.closeness import Tolerance

MAX_LENGTH = 20_000
"""Characters; longer JSON is no answer."""
MAX_DEPTH = 32
"""Arrays and objects inside each other; deeper JSON is no answer."""

_FENCE = re.compile(r"^[ \t]*```[ \t]*\w*[ \t]*$", re.MULTILINE)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z|\\)', re.DOTALL)
"""One that does not end goes to the text's end, so that every character is looked at once."""
_NUMBER = re.compile(r"(-?[0-9]{1,1000}(?:\.[0-9]{1,1000})?)(?:[eE]([+-]?[0-9]{1,3}))?")


class JsonValue:
    """A parsed answer; None, too, is one (`null`)."""

    def __init__(self, value: Any):
        self.value = value


def last_fenced_block(text: str) -> str | None:
    """The content of the last block between two lines of three backticks; None without one."""
    fences = [(match.start(), match.end()) for match in _FENCE.finditer(text)]
    closed = fences[: len(fences) // 2 * 2]  # an opened block that does not end is none
    return text[closed[-2][1] : closed[-1][0]].strip() if closed else None


def read_json(answer: str) -> JsonValue | None:
    r"""The value of a JSON text, also inside a fence of backticks, and with LaTeX's escaped braces `\{ … \}`.

    None for what is no JSON by the letter (NaN, Infinity and a key that comes twice included), is longer than
    ``MAX_LENGTH`` or deeper than ``MAX_DEPTH``, or has numbers with exponents of more than three digits. Numbers become
    exact rationals.
    """
    if len(answer) > MAX_LENGTH:
        return None
    text = answer.strip()
    if text.startswith("```"):
        text = re.sub(r"^```\w*|```$", "", text).strip()
    if text.startswith(("\\{", "[\\{")):
        text = text.replace("\\{", "{").replace("\\}", "}")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return None
    try:
        return JsonValue(
            json.loads(
                text,
                parse_float=_number,
                parse_int=_number,
                parse_constant=_refuse_constant,
                object_pairs_hook=_object,
            )
        )
    except (ValueError, RecursionError):
        return None


def same_json(given: Any, expected: Any, tolerance: Tolerance) -> bool:
    """Whether two parsed values agree: numbers within the tolerance, lists in order, objects whatever their order.

    Texts and keys are compared to the letter; `true` is not 1.
    """
    if isinstance(expected, Fraction):
        return isinstance(given, Fraction) and tolerance.allows(given, expected)
    if isinstance(expected, list):
        return (
            isinstance(given, list)
            and len(given) == len(expected)
            and all(same_json(mine, other, tolerance) for mine, other in zip(given, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(given, dict)
            and given.keys() == expected.keys()
            and all(same_json(given[key], expected[key], tolerance) for key in expected)
        )
    return type(given) is type(expected) and given == expected


def _number(digits: str) -> Fraction:
    match = _NUMBER.fullmatch(digits)
    if match is None:
        raise ValueError(f"a number of {len(digits)} characters")
    return Fraction(match[1]) * Fraction(10) ** int(match[2] or 0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)
