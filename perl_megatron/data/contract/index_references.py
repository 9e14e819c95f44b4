"""References by number: "image 2", "Figure #2", "images 1, 2 and 4", "image_3", "<image 3>", "fig. 2", "image two".

Numbers elsewhere ("2 images", "7", "image 2.5") are not references. After a singular noun one number is read; "image 1
and 3" is refused as ambiguous. Number words are read where they cannot count something else: "in image two, …", but not
"in the image two dogs …"; what could be either is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from perl_megatron.data.contract.reference_phrases import (
    CONJUNCTION,
    NOUN_AT_WORD_START,
    NUMBERS,
    SPACE,
    Phrase,
    Reference,
    as_number,
    holds_any,
    number_reference,
    preceded_by,
)
from perl_megatron.errors import UserError

_DIGITS = r"#?\d++(?!\w|\.\d|[^\S\n]*+%)"
_RANGE_WORD = r"(?:-|–|—|to\b|through\b)"
_ITEM = rf"(?:{_DIGITS}(?:{SPACE}{_RANGE_WORD}{SPACE}{_DIGITS})?|\(#?\d+\)|\[#?\d+\])"
_NOUN = rf"{NOUN_AT_WORD_START}(?:(?P<plural>s)|(?!s))(?:(?<=fig)\.|(?<=figs)\.)?"
_NUMBER_WORD = r"(?:(?P<word>number|no\.|num\.|nr\.?|№)[^\S\n]*+)?"
_INDEX = re.compile(
    rf"{_NOUN}(?:{SPACE}|[-_]){_NUMBER_WORD}(?P<list>{_ITEM}"
    rf"(?P<rest>(?:{SPACE},{SPACE}{_ITEM})*+(?:{SPACE},?{SPACE}{CONJUNCTION}{SPACE}{_ITEM})*+))",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d")
_CONJOINED = re.compile(rf"{SPACE}{CONJUNCTION}{SPACE}#?(\d+)", re.IGNORECASE)
_ITEMS = re.compile(_ITEM, re.IGNORECASE)
_FROM = re.compile(r"\bfrom\s+$", re.IGNORECASE)
_DETERMINER = re.compile(r"\b(?:the|this|that|these|those|each|every|an?|another|same|whole|any|which|what)\s+$", re.I)

_ANY_NUMBER = rf"(?:{'|'.join(NUMBERS)})\b"
_IN_WORDS = re.compile(
    rf"{_NOUN}(?:[^\S\n]++|[-_]){_NUMBER_WORD}(?P<list>{_ANY_NUMBER}"
    rf"(?P<rest>(?:{SPACE},{SPACE}{_ANY_NUMBER})*+(?:{SPACE},?{SPACE}{CONJUNCTION}{SPACE}{_ANY_NUMBER})*+))",
    re.IGNORECASE,
)
_WORDS = re.compile(_ANY_NUMBER, re.IGNORECASE)
_NOT_COUNTING = re.compile(
    r"\s*+(?:$|[?.!,;:)\]}>'’\"*/&-]|<image>|(?:and|or|to|than|vs|versus|is|are|was|were|has|have|does|do|shows?|contains?"
    r"|depicts?|displays?|features?|with|but|from|compared|differs?|if|show|when|while)\b)",
    re.IGNORECASE,
)


def find_indices(text: str, num_images: int) -> Iterator[Phrase]:
    """All phrases that name images by number. Raises ``UserError`` for what could be read in two ways."""
    if _DIGIT.search(text):
        for match in _INDEX.finditer(text):
            yield _in_digits(text, match, num_images)
    if not holds_any(text, NUMBERS):
        return
    for match in _IN_WORDS.finditer(text):
        if phrase := _in_words(text, match, num_images):
            yield phrase


def _in_digits(text: str, match: re.Match[str], num_images: int) -> Phrase:
    end = match.end() if match["plural"] else match.start("rest")
    conjoined = None if match["plural"] else _CONJOINED.match(text, end)
    if conjoined and 1 <= as_number(conjoined[1]) <= num_images:
        raise UserError(
            f"'{text[match.start() : conjoined.end()]}' is ambiguous: is {conjoined[1]} an image?",
            fix="write 'images 1 and 3' or 'image 1 and image 3'",
        )
    if text[match.start("list")] in "([" and preceded_by(text, match.start(), _DETERMINER):
        raise _ambiguous(text[match.start() : end])
    items = [_item(text, *item.span()) for item in _ITEMS.finditer(text, match.start("list"), end)]
    if any(item.render is None for item in items) and preceded_by(text, match.start(), _FROM):
        raise UserError(
            f"'from {text[match.start() : end]}' is ambiguous: is it a set or a direction?",
            fix="write 'from image 1 to image 3' or 'images 1-3'",
        )
    return Phrase(match.start(), end, tuple(items))


def _item(text: str, start: int, end: int) -> Reference:
    """The reference for a number, or for a range such as '1-3', at ``text[start:end]``."""
    numbers = list(re.finditer(r"\d+", text[start:end]))
    if len(numbers) == 1:
        return number_reference(numbers[0][0], start + numbers[0].start())
    first, last = as_number(numbers[0][0]), as_number(numbers[1][0])
    if last - first >= 1000:  # more images than any record has: keep the ends, for the check of existence
        return Reference(start, end, (first - 1, last - 1), None)
    return Reference(start, end, tuple(range(first - 1, last)), None)


def _in_words(text: str, match: re.Match[str], num_images: int) -> Phrase | None:
    """The phrase, or None where the words count something: 'in the image two dogs'."""
    numbered = match["word"] is not None
    determined = preceded_by(text, match.start(), _DETERMINER)
    if determined and not numbered:
        return None
    plural = match["plural"]
    end = match.end() if plural else match.start("rest")
    words = list(_WORDS.finditer(text, match.start("list"), end))
    if plural and len(words) == 1:
        return None
    whole = text[match.start() : match.end()]
    if not numbered and not _NOT_COUNTING.match(text, end):
        raise _ambiguous(whole)
    if not plural and match["rest"] and "," not in match["rest"]:
        raise _ambiguous(whole)
    return Phrase(match.start(), end, tuple(number_reference(word[0], word.start()) for word in words))


def _ambiguous(phrase: str) -> UserError:
    return UserError(f"'{phrase}' is ambiguous: is it an image's number?", fix="write numbers of images in digits")
