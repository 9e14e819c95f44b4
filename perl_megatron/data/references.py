"""References in a question's text to its images: found, checked, and rewritten to follow the images.

Two grammars, one for each ``ReferenceRule``; nouns are image, picture, figure, photo, photograph:

- ``INDEX``: "image 2", "Figure #2", "images 1, 2 and 4". Numbers elsewhere ("2 images", "7", "image 2.5") are not
  references. After a singular noun one number is read; "image 1 and 3" is refused as ambiguous.
- ``ORDINAL``: "the second image", "the 2nd picture", "the first and the last image".

A reference that labels a placeholder ("Image 2: <image>") names the slot, not the image, and stays. Sets ("images 1-3",
"the first two images") stay too, and need slots that permutation maps onto themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER, ReferenceRule


@dataclass(frozen=True)
class Reference:
    """One number or ordinal in a text that names an image. ``text[start:end]`` is the token that is rewritten."""

    start: int
    end: int
    slots: tuple[int, ...]
    """The 0-based slot that it names; several for a set, which is never rewritten."""
    render: Callable[[int], str] | None
    """The token for another slot, in the same style; None for a set."""


def find_references(text: str, rules: Collection[ReferenceRule], num_images: int) -> list[Reference]:
    """All references of the given kinds, in text order, without labels of placeholders.

    Raises ``UserError`` for a reference to an image that does not exist, a label that contradicts its placeholder, and
    wordings that cannot be followed safely ("image 1 or 3", "the second-to-last image", "the second one").
    """
    found: list[Reference] = []
    if ReferenceRule.INDEX in rules:
        found += _find_indices(text, num_images)
    if ReferenceRule.ORDINAL in rules:
        found += _find_ordinals(text, num_images)
    return sorted(found, key=lambda reference: reference.start)


def rewrite_references(text: str, references: Sequence[Reference], new_slots: Sequence[int]) -> str:
    """The text with every reference renamed: the image of old slot s now stands in ``new_slots[s]``."""
    for reference in sorted(references, key=lambda reference: -reference.start):
        if reference.render is not None and new_slots[reference.slots[0]] != reference.slots[0]:
            token = reference.render(new_slots[reference.slots[0]])
            text = text[: reference.start] + token + text[reference.end :]
    return text


_SPACE = r"[^\S\n]*"
_NOUN = r"(?:image|picture|figure|photo|photograph)"
_NUMBER = r"#?\d+(?!\w|\.\d|\s*%)"
_RANGE_WORD = r"(?:-|–|—|to\b|through\b)"
_ITEM = rf"{_NUMBER}(?:{_SPACE}{_RANGE_WORD}{_SPACE}{_NUMBER})?"
_CONJUNCTION = r"(?:and\b|or\b|vs\b\.?|versus\b|&|/)"
_INDEX = re.compile(
    rf"(?<!\w){_NOUN}(?:(?P<plural>s)|(?!s))(?:{_SPACE}|[-_])(?:(?:number|no\.){_SPACE})?(?P<list>{_ITEM}"
    rf"(?P<rest>(?:{_SPACE},{_SPACE}{_ITEM})*(?:{_SPACE},?{_SPACE}{_CONJUNCTION}{_SPACE}{_ITEM})*))",
    re.IGNORECASE,
)
_CONJOINED = re.compile(rf"{_SPACE}{_CONJUNCTION}{_SPACE}#?(\d+)", re.IGNORECASE)

# fmt: off
_WORDS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
          "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
          "twentieth"]
# fmt: on
_COUNTS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_ORDINAL_WORD = rf"(?:{'|'.join(_WORDS)}|last|final|\d+(?:st|nd|rd|th))"
_ORDINAL = re.compile(
    rf"(?<![\w-])(?P<list>{_ORDINAL_WORD}(?:(?:\s*,\s*(?:(?:and|or)\s+)?|\s+(?:and|or|to|vs\.?|versus|than|&)\s+)"
    rf"(?:the\s+)?{_ORDINAL_WORD})*)\s+(?:(?P<count>{'|'.join(_COUNTS)}|\d+)\s+)?{_NOUN}s?\b",
    re.IGNORECASE,
)
_ORDINAL_TOKEN = re.compile(rf"\b{_ORDINAL_WORD}\b", re.IGNORECASE)
_UNSAFE_ORDINAL = re.compile(
    rf"\b(?:(?:{_ORDINAL_WORD}|next)[\s-]+(?:to[\s-]+)?last\s+{_NOUN}|penultimate\s+{_NOUN}"
    rf"|last\s+but\s+\w+\s+{_NOUN}|the\s+{_ORDINAL_WORD}\s+ones?\b)",
    re.IGNORECASE,
)
_LABEL_WITH_COLON = re.compile(rf"\s*[:=]\s*(?={re.escape(IMAGE_PLACEHOLDER)})")
_LABEL_AT_START = re.compile(rf"[\s.)-]*(?={re.escape(IMAGE_PLACEHOLDER)})")


def _find_indices(text: str, num_images: int) -> list[Reference]:
    found = []
    for match in _INDEX.finditer(text):
        listed = match["list"] if match["plural"] else match["list"][: len(match["list"]) - len(match["rest"])]
        end = match.start("list") + len(listed)
        conjoined = None if match["plural"] else _CONJOINED.match(text, end)
        if conjoined and 1 <= int(conjoined[1]) <= num_images:
            raise UserError(
                f"'{text[match.start() : conjoined.end()]}' is ambiguous: is {conjoined[1]} an image?",
                fix="write 'images 1 and 3' or 'image 1 and image 3'",
            )
        items = [
            _index_reference(text, match.start("list") + item.start(), match.start("list") + item.end())
            for item in re.finditer(_ITEM, listed, re.IGNORECASE)
        ]
        found += _checked(text, match.start(), end, items, num_images)
    return found


def _index_reference(text: str, start: int, end: int) -> Reference:
    """The reference for a number, or for a range such as '1-3', at ``text[start:end]``."""
    numbers = list(re.finditer(r"\d+", text[start:end]))
    first, last = int(numbers[0][0]), int(numbers[-1][0])
    if len(numbers) == 2:
        return Reference(start, end, tuple(range(first - 1, last)), None)
    return Reference(start + numbers[0].start(), end, (first - 1,), lambda slot: str(slot + 1))


def _find_ordinals(text: str, num_images: int) -> list[Reference]:
    if unsafe := _UNSAFE_ORDINAL.search(text):
        raise UserError(
            f"'{unsafe[0]}' cannot follow the images", fix="name the image by its number or by a plain ordinal"
        )
    found = []
    for match in _ORDINAL.finditer(text):
        items = [
            _ordinal_reference(token[0], match.start("list") + token.start(), num_images)
            for token in _ORDINAL_TOKEN.finditer(match["list"])
        ]
        if match["count"]:
            items = [_counted_reference(match, items, num_images)]
        found += _checked(text, match.start(), match.end(), items, num_images)
    return found


def _ordinal_reference(token: str, start: int, num_images: int) -> Reference:
    word = token.lower()
    if word in ("last", "final"):
        slot = num_images - 1
    elif word in _WORDS:
        slot = _WORDS.index(word)
    else:
        slot = int(word[:-2]) - 1
    numeral = word[0].isdigit()

    def render(new_slot: int) -> str:
        if numeral or new_slot >= len(_WORDS):
            return _numeral(new_slot + 1)
        new_word = _WORDS[new_slot]
        if token.isupper():
            return new_word.upper()
        return new_word.capitalize() if token[0].isupper() else new_word

    return Reference(start, start + len(token), (slot,), render)


def _numeral(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _counted_reference(match: re.Match[str], items: list[Reference], num_images: int) -> Reference:
    """The set named by 'first two images' or 'last three images'."""
    word = match["count"].lower()
    count = _COUNTS.index(word) + 2 if word in _COUNTS else int(word)
    if len(items) == 1 and match["list"].lower() in ("first", "1st"):
        return Reference(match.start(), match.end(), tuple(range(count)), None)
    if len(items) == 1 and match["list"].lower() in ("last", "final"):
        return Reference(match.start(), match.end(), tuple(range(num_images - count, num_images)), None)
    raise UserError(f"'{match[0]}' cannot follow the images", fix="name each image by its number")


def _checked(text: str, start: int, end: int, items: list[Reference], num_images: int) -> list[Reference]:
    """The items of the reference phrase ``text[start:end]``, or none if the phrase labels placeholders."""
    for item in items:
        if not item.slots or min(item.slots) < 0 or max(item.slots) >= num_images:
            raise UserError(
                f"'{text[start:end]}' refers to an image that does not exist: the record has {num_images}",
                fix="correct the number, or leave this kind out of the contract's references",
            )
    label = _LABEL_WITH_COLON.match(text, end)
    before = text[:start].rstrip(" \t,;(")
    if label is None and (not before or before.endswith(("\n", IMAGE_PLACEHOLDER))):
        label = _LABEL_AT_START.match(text, end)
    if label is None:
        return items
    named = [slot for item in items for slot in item.slots]
    labelled = text.count(IMAGE_PLACEHOLDER, 0, end)
    if named != list(range(labelled, labelled + len(named))):
        raise UserError(
            f"'{text[start:end]}' labels placeholder {labelled + 1}", fix="number the labels in the placeholders' order"
        )
    return []
