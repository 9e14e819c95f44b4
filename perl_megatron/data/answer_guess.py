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

MAX_GUESSED = 1000
"""Characters of the longest answer that is looked into; a longer one is a text. No choice, number or formula is."""
_MAX_WRAPPERS = 16
"""Wrappers around each other that are taken off; where there are more, none is."""
_WRAPPERS = (("\\boxed{", "}"), ("\\(", "\\)"), ("\\[", "\\]"))
_LEAD = re.compile(r"(?:the\s+)?(?:final\s+)?(?:correct\s+)?answer\s*(?:is\b\s*:?|:)\s*", re.IGNORECASE)
_LETTER = re.compile(
    r"(?i:(?:the\s++)?(?:(?:correct|right|best)\s++)?(?:answer|option|choice)\b(?:\s++is\b)?\s*+:?\s*+)?"
    r"(?:\(([A-Za-z])\)|([A-Z])(?=[).:]|$))[).:]?\s*(.*)",
    re.DOTALL,
)
_SMALL_LETTER = re.compile(r"([a-z])[).:]?")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_LATEX = re.compile(r"\\[A-Za-z]+|[\^_{}]")
_FORMULA = re.compile(r"[-+*/=().,\s°<>≤≥±]*[\d√π][-+*/=().,\s\d√π°<>≤≥±a-zA-Z]*")
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
    operators and single letters. All else is text, and so is an answer of more than ``MAX_GUESSED`` characters.
    """
    if len(answer.strip()) > MAX_GUESSED:
        return GuessedAnswer(answer.strip(), "text")
    plain = _unwrapped(answer)
    options = lettered_options(text)
    choice = option_named_by(answer, options)
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


def option_named_by(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names; None where it names none of them, or it is not clear which.

    It names one by its letter, by letter and text ('B. blue') where these agree, or by its whole text. That is how
    'D.C. area' is the option of this text, and not D. Wrappers as in 'The answer is (B)' are read over.

    Args:
        options: the texts of the options A, B, …
    """
    if not options or len(answer.strip()) > MAX_GUESSED:
        return None
    plain = _unwrapped(answer)
    letters = [chr(ord("A") + index) for index in range(len(options))]
    named = _LETTER.fullmatch(plain)
    if named is not None:
        letter, rest = (named[1] or named[2]).upper(), named[3].strip()
        if letter in letters and (not rest or _same(rest, options[letters.index(letter)])):
            return letter
    by_text = [letter for letter, option in zip(letters, options, strict=True) if _same(option, plain)]
    if by_text:
        return by_text[0] if len(by_text) == 1 else None
    small = _SMALL_LETTER.fullmatch(plain)  # an option's own text may be 'a': that came first
    return small[1].upper() if small is not None and small[1].upper() in letters else None


def _unwrapped(answer: str) -> str:
    """Wrappers are taken off one by one, as long as they are around the whole."""
    plain = answer.strip()
    for _ in range(_MAX_WRAPPERS):
        lead = _LEAD.match(plain)
        shorter = _inside(plain if lead is None else plain[lead.end() :].strip())
        if shorter == plain:
            break
        plain = shorter
    else:
        return answer.strip()
    bare = plain[:-1] if plain.endswith(".") else plain
    return bare if _NUMBER.fullmatch(bare) else plain


def _inside(text: str) -> str:
    """What the wrapper around the whole text holds; the text itself where there is none, as in '$1$ and $2$'."""
    if text.startswith("$") and text.endswith("$"):
        inside = text.strip("$").strip()
    else:
        ends = next((ends for ends in _WRAPPERS if text.startswith(ends[0]) and text.endswith(ends[1])), None)
        if ends is None:
            return text
        inside = text.removeprefix(ends[0]).removesuffix(ends[1]).strip()
    depths = list(accumulate((character == "{") - (character == "}") for character in inside))
    is_whole = inside and "$" not in inside and min(depths) >= 0 == depths[-1]
    return inside if is_whole else text


def _same(one: str, other: str) -> bool:
    return one.strip().rstrip(".").casefold() == other.strip().rstrip(".").casefold() != ""
