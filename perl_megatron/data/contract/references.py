"""References in a question's text to its images: found, checked, and rewritten to follow the images.

One grammar for each ``ReferenceRule``, in ``index_references``, ``ordinal_references``, ``position_references`` and
``letter_references``. A reference that labels a placeholder ("Image 2: <image>", "here is the first image <image> and
the second image <image>") names the slot, not the image, and stays. Sets ("images 1-3", "the first two images") stay
too, and need slots that permutation maps onto themselves.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import pairwise

from perl_megatron.data.contract.index_references import find_indices
from perl_megatron.data.contract.letter_references import find_letters
from perl_megatron.data.contract.ordinal_references import find_ordinals
from perl_megatron.data.contract.position_references import find_positions
from perl_megatron.data.contract.reference_phrases import (
    NEUTRAL,
    NOUN,
    NUMBERS,
    Phrase,
    Reference,
    cannot_follow,
    check_existence,
    holds_any,
    preceded_by,
)
from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER, ReferenceRule

SENTENCE_RULES = (ReferenceRule.INDEX, ReferenceRule.ORDINAL, ReferenceRule.POSITION, ReferenceRule.LETTER)
"""The kinds of reference that are read in sentences."""


def find_references(
    text: str, rules: Collection[ReferenceRule], num_images: int, letters: Sequence[int | None] | None = None
) -> list[Reference]:
    """All references of the given kinds, in text order, without labels of placeholders.

    ``letters`` gives the slot that each letter names (None: the letters in turn, for as many images as there are).
    Raises ``UserError`` for a reference to an image that does not exist, a label that contradicts its placeholder, and
    wordings that cannot be followed safely ("image 1 or 3", "the second-to-last image", "the second one").
    """
    phrases: list[Phrase] = []
    if ReferenceRule.INDEX in rules:
        phrases += find_indices(text, num_images)
    if ReferenceRule.ORDINAL in rules:
        phrases += find_ordinals(text, num_images)
    if ReferenceRule.POSITION in rules:
        phrases += find_positions(text, num_images)
    if ReferenceRule.LETTER in rules:
        phrases += find_letters(text, range(num_images) if letters is None else letters)
    if not phrases:
        return []
    phrases.sort(key=lambda phrase: (phrase.start, phrase.end))
    for phrase in phrases:
        check_existence(phrase, text, num_images)
    for before, after in pairwise(phrases):
        if after.start < before.end and after.slots != before.slots:
            raise cannot_follow(text[before.start : after.end])
    references = [reference for phrase in _without_labels(text, phrases) for reference in phrase.references]
    references.sort(key=lambda reference: reference.start)
    for earlier, later in pairwise(references):
        if later.start < earlier.end:
            raise cannot_follow(text[earlier.start : later.end])
    return references


def rewrite_references(text: str, references: Sequence[Reference], new_slots: Sequence[int]) -> str:
    """The text with every reference renamed: the image of old slot s now stands in ``new_slots[s]``."""
    pieces, end = [], 0
    for reference in sorted(references, key=lambda reference: reference.start):
        slot = reference.slots[0]
        if reference.render is not None and new_slots[slot] != slot:
            pieces += [text[end : reference.start], reference.render(new_slots[slot])]
            end = reference.end
    return "".join([*pieces, text[end:]])


_NEIGHBOURS = ("previous", "preceding", "prior", "next", "subsequent", "earlier", "later")
_ROLES = ("initial", "original", "starting", "ending", "opening", "closing", "reference", "query", "source", "target")
_RELATIVE_WORDS = (*_NEIGHBOURS, "former", "latter", "above", "below")
_COUNT = rf"(?:(?:{'|'.join(NUMBERS)}|\d++)\s++)?"
_RELATIVE = re.compile(
    rf"\b(?:{'|'.join(_NEIGHBOURS)})\s++{_COUNT}{NEUTRAL}{NOUN}s?\b|\bthe\s++(?:former|latter)\b|\b(?:earlier|later)\s++of\s++the\b"
    rf"|\b(?:above|below)\s++{NOUN}\b(?!s)|\b(?:the|this)\s++{NOUN}\s++(?:above|below)\b",
    re.IGNORECASE,
)
_ROLE = re.compile(rf"\b(?:{'|'.join(_ROLES)})\s++{_COUNT}{NEUTRAL}{NOUN}s?\b", re.IGNORECASE)
_OTHER = re.compile(rf"\bthe\s++other\s++{NEUTRAL}(?:{NOUN}|one)\b", re.IGNORECASE)
_ONE = re.compile(
    rf"\bone\s++(?:of\s++(?:them|(?:the|these|those)\s++(?:\w++\s++)?(?:{NOUN})s)\b|(?:of\s++)?{NOUN}\b)", re.IGNORECASE
)


def refuse_relative(text: str, *, all_move: bool = True) -> None:
    """Refuse a wording that names an image by its neighbour ("the next image") or by the text ("the latter").

    Only for records whose images move: such a wording cannot be rewritten in general. "The other image" stays after
    "one image", and a role ("the reference image") may be that of an image that stays (``all_move`` is false).
    """
    if holds_any(text, _RELATIVE_WORDS) and (relative := _RELATIVE.search(text)):
        raise cannot_follow(relative[0])
    if all_move and holds_any(text, _ROLES) and (role := _ROLE.search(text)):
        raise cannot_follow(role[0])
    if (other := _OTHER.search(text)) and not _ONE.search(text, 0, other.start()):
        raise cannot_follow(other[0])


_PLACEHOLDER = re.compile(re.escape(IMAGE_PLACEHOLDER))
_LABEL_WITH_COLON = re.compile(rf"[>\])}}]?\s*+[:=]\s*+(?={IMAGE_PLACEHOLDER})")
_LABEL_AT_START = re.compile(rf"[\s.)\]>}}-]*+(?={IMAGE_PLACEHOLDER})")
_START = re.compile(rf"(?:^|\n|{IMAGE_PLACEHOLDER})[ \t,;(\[<{{]*(?:the\s+)?$", re.IGNORECASE)
_INTRODUCTION = re.compile(rf"[\s,:=(\[]*+(?:(?:is|are)\b[\s:(\[]*+)?(?={IMAGE_PLACEHOLDER})", re.IGNORECASE)


def _without_labels(text: str, phrases: list[Phrase]) -> list[Phrase]:
    """The phrases that refer to images: not those that stand before a placeholder as its label."""
    placeholders = [match.start() for match in _PLACEHOLDER.finditer(text)]
    kept: list[Phrase] = []
    introducing: list[Phrase] = []
    introduced: set[int] = set()
    for phrase in phrases:
        next_slots = range(first := bisect_left(placeholders, phrase.end), first + len(phrase.slots))
        agrees = phrase.slots == tuple(next_slots) and next_slots.stop <= len(placeholders)
        if _is_label(text, phrase):
            if not agrees:
                raise UserError(
                    f"'{text[phrase.start : phrase.end]}' labels placeholder {next_slots.start + 1}",
                    fix="number the labels in the placeholders' order",
                )
            introduced.update(next_slots)
        elif agrees and _INTRODUCTION.match(text, phrase.end):
            introducing.append(phrase)
            introduced.update(next_slots)
        else:
            kept.append(phrase)
    # Within a sentence a label looks like a reference before the images: it is one only where every image has its own.
    return kept if len(introduced) == len(placeholders) else [*kept, *introducing]


def _is_label(text: str, phrase: Phrase) -> bool:
    """Whether a phrase is followed by a colon and a placeholder, or stands alone between line start and placeholder."""
    if _LABEL_WITH_COLON.match(text, phrase.end):
        return True
    at_start = preceded_by(text, phrase.start, _START) is not None
    return at_start and _LABEL_AT_START.match(text, phrase.end) is not None
