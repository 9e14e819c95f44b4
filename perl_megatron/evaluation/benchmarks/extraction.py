r"""What a response answers, and which option that is.

The prediction of a response is, for every benchmark: the content of its last balanced ``\boxed{…}`` (as in training);
without one, the text after ``</think>`` (nothing where a ``<think>`` was never closed), and of that what follows the
last "final answer:", or else the last "the answer is", or else the last "answer:", where there is one.

Readers are strict: 'A or B', 'not B' and 'Because' are no option. All take time linear in the response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from perl_megatron.reward.answers import plain
from perl_megatron.reward.boxed import last_boxed

MAX_LENGTH = 2000
"""Characters of a prediction that are looked at."""
MARKERS = ("final answer:", "the answer is", "answer:")
"""Mantis-Eval's, in their order of precedence; case does not matter."""

_BOX_OR_BRACE = re.compile(r"\\{1,2}boxed\{|\\.|[{}]", re.DOTALL)
_LETTER = re.compile(
    r"(?:option|choice)?\s*(?P<open>[(\[]?)\s*(?P<letter>[A-Za-z])(?P<close>(?:\s?[)\].:,;])*)(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_CONTINUES = re.compile(r"\s*(?:$|[-–—:(]|(?:because|since|as|due|for|is (?:the )?(?:correct|right))\b)", re.IGNORECASE)
_OTHER_LETTER = re.compile(
    r"\s*(?:[,/&;+|]|or\b|and\b)*\s*(?:option\s*)?[(\[]?\s*[A-Za-z]\s*(?:$|[)\].,:;])", re.IGNORECASE
)
_DECORATION = " \t*_`'\""
_MARKED_OPTION = re.compile(r"(?:^|(?<=[\s,;]))\(?([A-Z])\s?[).:]\s*")


@dataclass(frozen=True)
class Prediction:
    """What a response answers."""

    text: str
    """At most ``MAX_LENGTH`` characters."""
    source: str
    """'box', 'marker' (after one of ``MARKERS``) or 'whole' (the text after the thinking)."""

    def value(self) -> str:
        """The part that can be a value: all of a box, else the first line after a marker, else the last line."""
        if self.source == "box":
            return self.text
        lines = [line for line in self.text.splitlines() if line.strip()]
        return "" if not lines else lines[0 if self.source == "marker" else -1]


def predict(response: str) -> Prediction | None:
    """The prediction of a response; None where it has none."""
    boxed = last_boxed(response)
    if boxed is not None:
        return _prediction(boxed, "box")
    text = after_thinking(response)
    lowered = text.lower()
    if len(lowered) == len(text):  # not so for a few letters of other languages; then markers cannot be located
        for marker in MARKERS:
            at = lowered.rfind(marker)
            if at >= 0:
                return _prediction(text[at + len(marker) :].lstrip(" :*\t\n"), "marker")
    return _prediction(text, "whole")


def after_thinking(response: str) -> str:
    """The text after the last ``</think>``; all of it without thinking, nothing where the thinking did not end."""
    _, closed, after = response.rpartition("</think>")
    if closed:
        return after
    return "" if "<think>" in response else response


def all_boxed(text: str) -> list[str]:
    r"""The contents of all outermost balanced ``\boxed{…}``, in order."""
    found, open_boxes, depth_of_box = [], 0, -1
    depth = start = 0
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token.endswith("boxed{") or token == "{":
            depth += 1
            if token != "{" and not open_boxes:
                open_boxes, depth_of_box, start = 1, depth, match.end()
        elif token == "}" and depth:
            if open_boxes and depth == depth_of_box:
                found.append(text[start : match.start()])
                open_boxes = 0
            depth -= 1
    return found


def read_option(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that ``text`` names: by its leading letter, or by the option's whole text.

    A leading letter stands alone (on its line), in brackets, before ``. ) : , ;``, before the option's own text, or
    before a reason ("B because …"); one that other letters follow ('A or B') names nothing. A letter wins over an
    option's text. Without ``options`` (their texts) every letter names one.
    """
    text = plain(text[:MAX_LENGTH]).strip(_DECORATION + "\n")
    match = _LETTER.fullmatch(text)
    index = -1 if match is None else ord(match["letter"].upper()) - ord("A")
    if match is not None and index < (len(options) or 26):
        rest = match["rest"].strip(_DECORATION)
        is_marked = set(match["open"] + match["close"]) & set("([)].:")
        if is_marked and rest and options and fold(rest) == fold(options[index]):
            return match["letter"].upper()  # 'B. x', where 'x' alone could be another letter
        if rest and _OTHER_LETTER.match(rest):
            return None
        if _stands_for_option(match, rest, options[index] if options else None):
            return match["letter"].upper()
    named = [index for index, option in enumerate(options) if fold(option) == fold(text)]
    return chr(ord("A") + named[0]) if len(named) == 1 else None


def _stands_for_option(match: re.Match[str], rest: str, own_text: str | None) -> bool:
    """Whether a leading letter is an option's, and not the beginning of a word, an article or a pronoun."""
    if not rest or match["open"] or match["close"] or match["rest"].lstrip(" \t").startswith("\n"):
        return True
    if match["rest"][0].isalnum():
        return False  # a word
    if own_text is not None and fold(rest) == fold(own_text):
        return True
    return match["letter"].isupper() and match["rest"][0].isspace() and _CONTINUES.match(rest) is not None


def fold(text: str) -> str:
    """``text`` for comparison: LaTeX's text commands, case, runs of space, a final full stop and ``$`` do not count."""
    return " ".join(plain(text).replace("$", "").split()).rstrip(". ").casefold()


def split_options(text: str) -> tuple[str, ...]:
    """The options' texts of a lettered list such as 'A: a dog\\nB: a cat' or '(A) 3 (B) 4'; () where it is none.

    Only a list that begins with A and has no gap is one; what stands before it does not matter.
    """
    marks = list(_MARKED_OPTION.finditer(text))
    starts = [index for index, mark in enumerate(marks) if mark[1] == "A"]
    for first in reversed(starts):
        run = marks[first:]
        letters = [mark[1] for mark in run]
        if len(run) >= 2 and letters == [chr(ord("A") + index) for index in range(len(run))]:
            ends = [*(mark.start() for mark in run[1:]), len(text)]
            texts = [text[mark.end() : end].strip().rstrip(",;") for mark, end in zip(run, ends, strict=True)]
            return tuple(texts) if all(texts) else ()
    return ()


def without_letter(option: str, index: int) -> str:
    """An option without a letter of its own: '(B) a cat', 'B: a cat' and 'B. a cat' are 'a cat' at index 1."""
    letter = chr(ord("A") + index)
    return re.sub(rf"^\s*\(?{letter}\s?[).:]\s*", "", option).strip()


def _prediction(text: str, source: str) -> Prediction | None:
    text = text.strip()[:MAX_LENGTH]
    return Prediction(text, source) if text else None
