r"""Answers as values: each reader turns one kind of boxed answer into something that compares exactly, or None.

Readers are strict: what they do not recognise as a whole is no answer, so that 'A or B' is never right. They take any
text at all: what is longer than ``MAX_LENGTH`` is no answer, and nothing shorter takes long.
"""

from __future__ import annotations

import re
import string
import unicodedata
from fractions import Fraction

MAX_LENGTH = 1000
"""Characters; a longer answer is no answer. It bounds the time of every reader."""

MAX_NESTING = 20
"""LaTeX's text commands inside each other."""
THIN_SPACE = "\u2009"
"""What TeX's ``\\,`` and its like become: in a number it may group digits by three, as in 12 345."""

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{([^{}]*)\}")
_SIZING = re.compile(r"\\(?:left|right|displaystyle|!)(?![a-zA-Z])|\\[()\[\]]")
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"), "-")
_IMAGE_WORD = r"(?:images?|figures?|pictures?|photos?|photographs?|img)"
_DIGITS = rf"(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,3}}(?:{THIN_SPACE}[0-9]{{3}})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:\\[dt]?frac\s*(?:\{{\s*(?P<top>{_DECIMAL})\s*\}}\s*\{{\s*(?P<under>{_DECIMAL})\s*\}}"
    r"|(?P<top_digit>[0-9])\s*(?P<under_digit>[0-9])(?![0-9]))"
    rf"|(?P<whole>{_DECIMAL})(?:e(?P<exponent>[+-]?[0-9]{{1,3}})|\s*/\s*(?P<slash>{_DECIMAL}))?)",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(
    rf"\\(?:rightarrow|to|gt|lt)(?![a-z])|\\?[{{}}]|[,;<>→()\[\]-]|\band\b|\b{_IMAGE_WORD}(?![a-z])"
)
# fmt: off
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
             "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
             "twentieth"]
# fmt: on
_ORDINAL_IMAGE = re.compile(rf"(?:the )?(?:([a-z]+)|([0-9]{{1,3}})(?:st|nd|rd|th)) {_IMAGE_WORD}")
_NUMBERED_IMAGE = re.compile(rf"(?:the )?{_IMAGE_WORD}(?![a-z])(?: (?:number|no\.?)(?![a-z]))?\s*#?", re.IGNORECASE)
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}


def read_choice(answer: str) -> str | None:
    r"""The upper-case letter of an option: 'B', 'b', '(B)', 'B.', 'B)', 'Option B', '\text{B}'."""
    match = re.fullmatch(
        r"(?:(?:option|choice|answer)\b\s*:?\s*)?\(?\s*([A-Za-z])\s*\)?\s*[.:]?", plain_answer(answer), re.I
    )
    return match and match[1].upper()


def read_number(answer: str) -> Fraction | None:
    r"""The exact value of '1,234.50', '-3/4', '\frac{3}{4}', '1e3' or '50%' (one half: the sign counts)."""
    text = plain_number(answer)
    is_percent = text.endswith("%")
    match = NUMBER.fullmatch(text[:-1].rstrip() if is_percent else text)
    value = match and number_value(match)
    return value / 100 if value is not None and is_percent else value


def number_value(match: re.Match[str]) -> Fraction | None:
    """The value of a match of ``NUMBER``; None for a fraction over 0."""
    top = _fraction(match["top"] or match["top_digit"] or match["whole"])
    under = _fraction(match["under"] or match["under_digit"] or match["slash"] or "1")
    if under == 0:
        return None
    value = top / under * Fraction(10) ** int(match["exponent"] or 0)
    return -value if match["sign"] == "-" else value


def read_index(answer: str, num_images: int = 0) -> Fraction | None:
    """An image's 1-based number: a number, also as 'image 2', 'Figure #2', 'the second image' or '2nd photo'.

    'the last image' needs ``num_images``.
    """
    image = read_image(answer, num_images)
    return read_number(answer) if image is None else image


def read_image(answer: str, num_images: int = 0) -> Fraction | None:
    """The same, where the answer says that it is an image: a bare number is None."""
    text = " ".join(plain_answer(answer).split()).removesuffix(".")
    ordinal = _ORDINAL_IMAGE.fullmatch(text.casefold())
    if ordinal is not None and ordinal[2] is not None:
        return Fraction(ordinal[2])
    if ordinal is not None and ordinal[1] in _ORDINALS:
        return Fraction(_ORDINALS.index(ordinal[1]) + 1)
    if ordinal is not None and ordinal[1] in ("last", "final") and num_images:
        return Fraction(num_images)
    noun = _NUMBERED_IMAGE.match(text)
    return None if noun is None else read_number(text[noun.end() :])


def read_ordering(answer: str) -> tuple[int, ...] | None:
    """A sequence of image numbers: '3, 1, 2', '3 1 2', '3>1>2', '[3,1,2]', 'image 3, image 1, image 2', '312'.

    Separators have no meaning: '3 < 1 < 2' is the same sequence. What `data/permutation.py` accepts is read here.
    """
    words = _SEPARATOR.sub(" ", plain_answer(answer).lower()).split()
    if not words or not all(re.fullmatch(r"[0-9]+", word) for word in words):
        return None
    if len(words) == 1:  # without separators, every digit is an image
        words = list(words[0])
    return tuple(int(word) for word in words)


def read_text(answer: str) -> str | None:
    """Any text, without its case and with runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", plain_answer(answer)).split()).casefold() or None


def read_short_text(answer: str) -> str | None:
    """A text without case, punctuation and articles, as SQuAD and VQA compare answers; 'two' is 2, as in VQA.

    Unlike SQuAD's, the rule keeps what makes numbers and formulas differ: punctuation between digits ('1.5', '1/2',
    '12:30'; not the commas of '1,000'), a sign or point before a number, '%', and all symbols ('<', '+', '€'). Hyphens
    between words become spaces (VQA). Articles stay where nothing else is left: 'A' is an answer.
    """
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", read_text(answer) or "")
    text = re.sub(r"\s+%", "%", re.sub(r"(?<=[^\W0-9_])-(?=[^\W0-9_])", " ", text))
    padded = f" {text} "
    kept = (
        character if _counts(before, character, after) else ""
        for before, character, after in zip(padded, padded[1:], padded[2:], strict=False)
    )
    words = [NUMBER_WORDS.get(word, word) for word in "".join(kept).split()]
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words) or None


def _counts(before: str, character: str, after: str) -> bool:
    """Whether a character of a short text makes a difference."""
    if character == "%" or (character != "`" and not unicodedata.category(character).startswith("P")):
        return True
    return after.isdigit() and (before.isdigit() or (character in "-." and (before.isspace() or before in "-(")))


def plain(answer: str) -> str:
    r"""``answer`` without surrounding space and math delimiters and without LaTeX's text, font and sizing commands.

    Full-width and mathematical letters and the digits of all scripts become ASCII, dashes and minus signs '-'. Takes
    time linear in the text: commands inside each other are removed to a depth of ``MAX_NESTING``.
    """
    return plain_inside_math(answer).strip("$").strip()


def plain_answer(answer: str) -> str:
    """``plain``, and '' for an answer longer than ``MAX_LENGTH``."""
    return plain(answer) if len(answer) <= MAX_LENGTH else ""


def plain_inside_math(answer: str) -> str:
    """``plain`` with its dollar signs, which may be a currency."""
    text = answer if answer.isascii() else answer.translate(_TO_ASCII)
    for _ in range(MAX_NESTING):
        text, changes = _WRAPPER.subn(r"\1", text)
        if not changes:
            break
    return _SIZING.sub("", text).strip()


def plain_number(answer: str) -> str:
    r"""``plain_answer`` with LaTeX's separators of digits as commas and thin spaces, and with '%' for '\%'."""
    return spaces_of_latex(plain_answer(answer)).replace("\\%", "%").strip()


def spaces_of_latex(text: str) -> str:
    r"""'1{,}000' and '1\,000' as '1,000' and '1 000' with a thin space."""
    return re.sub(r"\\[,:; ]|~|\u202f", THIN_SPACE, text.replace("{,}", ","))


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(THIN_SPACE, "").rstrip("."))


class _ToAscii(dict[int, str]):
    """For ``str.translate``; filled as characters are met. Superscripts and '½' stay: 10² is not 102."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Nd":
            character = string.digits[unicodedata.decimal(character)]
        elif category in ("Lu", "Ll") or 0xFF01 <= code <= 0xFF5E:
            character = unicodedata.normalize("NFKC", character)
        self[code] = character
        return character


_TO_ASCII = _ToAscii(_DASHES)
