"""What the grammars of references share: the phrases they find, nouns for an image, words for numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten

from perl_megatron.errors import UserError


@dataclass(frozen=True)
class Reference:
    """One token in a text that names an image. ``text[start:end]`` is what is rewritten."""

    start: int
    end: int
    slots: tuple[int, ...]
    """The 0-based slot that it names; several for a set, which is never rewritten."""
    render: Callable[[int], str] | None
    """The token for another slot, in the same style; None for a set, and where the style has no word for others."""

    def moved(self, offset: int) -> Reference:
        """The same where the text begins ``offset`` characters earlier."""
        return Reference(self.start + offset, self.end + offset, self.slots, self.render)


@dataclass(frozen=True)
class Phrase:
    """A noun with its references: 'images 1, 2 and 4', 'the first and the last image'."""

    start: int
    end: int
    references: tuple[Reference, ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """All slots that it names, in the order of its words."""
        return tuple(slot for reference in self.references for slot in reference.slots)


SPACE = r"[^\S\n]*+"
"""Blanks within a line; possessive, so that long runs cost linear time."""
NOUN = r"(?:image|picture|figure|photograph|photo|img|pic|fig)"
NOUN_AT_WORD_START = (
    r"(?-i:[ipfIPF])(?<!\w.)"
    r"(?:(?<=i)mage|(?<=i)mg|(?<=p)icture|(?<=p)hotograph|(?<=p)hoto|(?<=p)ic|(?<=f)igure|(?<=f)ig)"
)
"""``NOUN`` not within a word, to begin a pattern with: a set of first letters lets the search skip all other places."""
CONJUNCTION = r"(?:and\b|or\b|vs\b\.?|versus\b|&|/)"
NEUTRAL = r"(?:(?:given|provided|input|attached|uploaded|shown|displayed|presented)\s++)?"
"""Adjectives between an ordinal or a side and its noun that do not choose among the images."""

NUMBERS: tuple[str, ...] = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
ORDINALS: tuple[str, ...] = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    *("twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth"),
    "twentieth",
)


def in_case_of(token: str, word: str) -> str:
    """``word`` in capitals, with a capital or small, as ``token`` is."""
    if token.isupper() and len(token) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if token[:1].isupper() else word


def numeral(number: int) -> str:
    """'1st', '2nd', '11th', …"""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def number_reference(token: str, start: int) -> Reference:
    """The reference for a 1-based number, in digits or as a word; ``start`` is the token's place in the text."""
    word = token.lower()
    in_words = word in NUMBERS
    number = NUMBERS.index(word) + 1 if in_words else as_number(token)

    def render(slot: int) -> str:
        return in_case_of(token, NUMBERS[slot]) if in_words and slot < len(NUMBERS) else str(slot + 1)

    return Reference(start, start + len(token), (number - 1,), render)


def ordinal_reference(token: str, start: int, num_images: int) -> Reference:
    """The reference for 'second', '2nd' or 'last' of ``num_images``."""
    word = token.lower()
    if word in ("last", "final"):
        slot = num_images - 1
    elif word in ORDINALS:
        slot = ORDINALS.index(word)
    else:
        slot = as_number(word[:-2]) - 1

    def render(new_slot: int) -> str:
        if word[0].isdigit() or new_slot >= len(ORDINALS):
            return numeral(new_slot + 1)
        return in_case_of(token, ORDINALS[new_slot])

    return Reference(start, start + len(token), (slot,), render)


def as_number(digits: str) -> int:
    """The number; one of many digits (which Python would be slow to read, or refuse) is no image's, and becomes 10⁶."""
    return int(digits) if len(digits) <= 6 else 10**6


def cannot_follow(phrase: str) -> UserError:
    """The error for a wording that names images, but not in a way that can be rewritten safely."""
    return UserError(
        f"'{shorten(phrase, 80)}' cannot follow the images",
        fix="name each image by its number or by a plain ordinal, or declare fewer kinds of reference",
    )


def check_existence(phrase: Phrase, text: str, num_images: int) -> None:
    """Refuse a phrase that names a slot the record does not have."""
    for reference in phrase.references:
        if not reference.slots or min(reference.slots) < 0 or max(reference.slots) >= num_images:
            raise UserError(
                f"'{text[phrase.start : phrase.end]}' refers to an image that does not exist: the record has "
                f"{num_images}",
                fix="correct the number, or leave this kind out of the contract's references",
            )


def holds_any(text: str, words: tuple[str, ...]) -> bool:
    """Whether a text holds one of ``words`` (in small letters), in any case: quicker than a pattern that needs one."""
    text = text.lower()
    return any(word in text for word in words)


def preceded_by(text: str, position: int, pattern: re.Pattern[str], window: int = 24) -> re.Match[str] | None:
    """``pattern`` (which ends with ``$``) in the characters just before ``position``: looks back a bounded way."""
    return pattern.search(text[max(0, position - window) : position])
