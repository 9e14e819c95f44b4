r"""Answers as values: each reader turns one kind of boxed answer into something that compares exactly, or None.

Readers are strict: what they do not recognise as a whole is no answer, so that 'A or B' is never right.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 1000
"""Characters; a longer answer is no answer. It bounds the time of every reader."""

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{([^{}]*)\}")
_IMAGE_WORD = r"(?:images?|figures?|pictures?|photos?|img)"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:\\[dt]?frac\s*\{{\s*(?P<top>{_DECIMAL})\s*\}}\s*\{{\s*(?P<under>{_DECIMAL})\s*\}}"
    rf"|(?P<whole>{_DECIMAL})(?:e(?P<exponent>[+-]?[0-9]{{1,3}})|\s*/\s*(?P<slash>{_DECIMAL}))?)\s*(?P<percent>%?)",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(
    rf"\\(?:rightarrow|to|gt|lt)(?![a-z])|\\?[{{}}]|[,;<>→()\[\]-]|\band\b|\b{_IMAGE_WORD}(?![a-z])"
)


def read_choice(answer: str) -> str | None:
    r"""The upper-case letter of an option: 'B', 'b', '(B)', 'B.', 'B)', '\text{B}'."""
    match = re.fullmatch(r"\(?\s*([A-Za-z])\s*\)?\s*[.:]?", plain(answer))
    return match and match[1].upper()


def read_number(answer: str) -> Fraction | None:
    r"""The exact value of '1,234.50', '-3/4', '\frac{3}{4}', '1e3' or '50%' (one half: the sign counts)."""
    text = plain(answer).replace("{,}", ",").replace("\\%", "%").replace("−", "-")
    match = _NUMBER.fullmatch(re.sub(r"\\[,!; ]", "", text))
    if match is None:
        return None
    top = _fraction(match["top"] or match["whole"])
    under = _fraction(match["under"] or match["slash"] or "1")
    if under == 0:
        return None
    value = top / under * Fraction(10) ** int(match["exponent"] or 0)
    return (-value if match["sign"] == "-" else value) / (100 if match["percent"] else 1)


def read_index(answer: str) -> Fraction | None:
    """An image's 1-based number: a number, also as 'image 2' or 'Figure 2'."""
    return read_number(re.sub(rf"^{_IMAGE_WORD}(?![a-z])\s*#?", "", plain(answer), flags=re.IGNORECASE))


def read_ordering(answer: str) -> tuple[int, ...] | None:
    """A sequence of image numbers: '3, 1, 2', '3 1 2', '3>1>2', '[3,1,2]', 'image 3, image 1, image 2', '312'.

    Separators have no meaning: '3 < 1 < 2' is the same sequence. What `data/permutation.py` accepts is read here.
    """
    words = _SEPARATOR.sub(" ", plain(answer).lower()).split()
    if not words or not all(re.fullmatch(r"[0-9]+", word) for word in words):
        return None
    if len(words) == 1:  # without separators, every digit is an image
        words = list(words[0])
    return tuple(int(word) for word in words)


def read_text(answer: str) -> str | None:
    """Any text, without its case and with runs of white space as one space."""
    return " ".join(plain(answer).split()).casefold() or None


def plain(answer: str) -> str:
    r"""``answer`` without surrounding space and dollar signs and without LaTeX's text and font commands."""
    text, changes = answer, 1
    while changes:
        text, changes = _WRAPPER.subn(r"\1", text)
    return text.strip().strip("$").strip()


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").rstrip("."))
