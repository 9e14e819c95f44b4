"""What type of answer a question of a foreign dataset has, where nothing says so.

The rules are careful: what is not surely a choice or a number is compared as mathematics where it looks like it, else
as text. An import can be told the type instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from perl_megatron.data.contract.options import option_spans

_WRAPPERS = re.compile(r"\$+(.*?)\$+|\\boxed\{(.*)\}|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_LEAD = re.compile(r"(?:the\s+)?(?:final\s+)?(?:correct\s+)?answer\s*(?:is\b\s*:?|:)\s*", re.IGNORECASE)
_LETTER = re.compile(r"(?i:option\s+)?(?:\(([A-Za-z])\)|([A-Z])(?=[).:]|$))[).:]?\s*(.*)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_LATEX = re.compile(r"\\[A-Za-z]+|[\^_{}]")
_FORMULA = re.compile(r"[-+*/=().,\s\d√π°<>≤≥±]*[\d√π][-+*/=().,\s\d√π°<>≤≥±a-zA-Z]*")
_WORD = re.compile(r"[A-Za-z]{3,}")


@dataclass(frozen=True)
class GuessedAnswer:
    """An answer as it is graded."""

    answer: str
    """Without wrappers such as `$…$`, `\\boxed{…}` and 'The answer is'; of a choice the letter alone."""
    answer_type: str
    """'choice', 'number', 'math' or 'text'."""
    options: tuple[str, ...] = ()
    """Of a choice: the texts of the options A, B, …"""


def guess_answer(text: str, answer: str) -> GuessedAnswer:
    """The answer to the question ``text``, and its type.

    A choice: the text lists options (A), (B), … and the answer names one of them, by its letter or by its whole text. A
    number: nothing but digits, a sign, a point and commas between thousands. 'math': LaTeX, or a formula of digits,
    operators and single letters. All else is text.
    """
    plain = _unwrapped(answer)
    options = lettered_options(text)
    choice = _choice(plain, options)
    if choice is not None:
        return GuessedAnswer(choice, "choice", options)
    if _NUMBER.fullmatch(plain):
        return GuessedAnswer(plain, "number")
    if _LATEX.search(plain) or (_FORMULA.fullmatch(plain) and not _WORD.search(plain)):
        return GuessedAnswer(plain, "math")
    return GuessedAnswer(plain, "text")


def lettered_options(text: str) -> tuple[str, ...]:
    """The texts of the options A, B, … that a question lists; empty where it lists none."""
    return tuple(text[start:end].strip() for start, end in option_spans(text, None))


def with_options(text: str, options: Sequence[str]) -> str:
    """The question with its options as lines '(A) …', unless it lists as many already."""
    if not options or len(lettered_options(text)) >= len(options):
        return text
    own = [re.sub(r"^\s*(?:\([A-Z]\)|[A-Z][).:])\s*", "", option) for option in options]
    return "\n".join([text.rstrip(), *(f"({chr(ord('A') + index)}) {option}" for index, option in enumerate(own))])


def _unwrapped(answer: str) -> str:
    """Wrappers are taken off one by one, as long as they are around the whole."""
    plain = answer.strip()
    while True:
        shorter = _inside(_LEAD.sub("", plain, count=1).strip() if _LEAD.match(plain) else plain)
        if shorter == plain:
            break
        plain = shorter
    bare = plain[:-1] if plain.endswith(".") else plain
    return bare if _NUMBER.fullmatch(bare) else plain


def _inside(text: str) -> str:
    """What the wrapper around the whole text holds; the text itself where there is none, as in '$1$ and $2$'."""
    wrapped = _WRAPPERS.fullmatch(text)
    if wrapped is None:
        return text
    inside = next(part for part in wrapped.groups() if part is not None).strip()
    depths = list(accumulate((character == "{") - (character == "}") for character in inside))
    is_whole = inside and "$" not in inside and min(depths) >= 0 == depths[-1]
    return inside if is_whole else text


def _choice(plain: str, options: Sequence[str]) -> str | None:
    if not options:
        return None
    by_text = [index for index, option in enumerate(options) if _same(option, plain)]
    named = _LETTER.fullmatch(plain)
    if named is not None:
        index = ord((named[1] or named[2]).upper()) - ord("A")
        rest = named[3].strip()
        if index < len(options) and (not rest or _same(rest, options[index])):
            return chr(ord("A") + index)
    return chr(ord("A") + by_text[0]) if len(by_text) == 1 else None


def _same(one: str, other: str) -> bool:
    return one.strip().rstrip(".").casefold() == other.strip().rstrip(".").casefold() != ""
