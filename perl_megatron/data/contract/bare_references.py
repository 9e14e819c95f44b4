"""Texts that consist of references and nothing else: an option such as "2, 1, 3" or "left", an answer such as "second".

Within a sentence such words mean many things; as the whole of an option or an answer they are taken for images, where
the contract says that these name images (``ReferenceRule.OPTION_TEXT``, ``AnswerRule.REFERENCES``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from textwrap import shorten

from perl_megatron.data.contract.letter_references import letter_reference
from perl_megatron.data.contract.ordinal_references import ORDINAL_WORD
from perl_megatron.data.contract.position_references import position_reference
from perl_megatron.data.contract.reference_phrases import (
    NOUN,
    Phrase,
    Reference,
    check_existence,
    number_reference,
    ordinal_reference,
)
from perl_megatron.data.contract.references import find_references
from perl_megatron.errors import UserError
from perl_megatron.types import ReferenceRule

_TOKEN = re.compile(
    r"#?(?P<index>\d++)(?![\w%]|\.\d)"
    rf"|(?P<ordinal>{ORDINAL_WORD})"
    r"|(?P<position>(?:(?:left|right)(?:[- ]?most)?|middle|cent(?:er|re))\b)"
    r"|(?P<noise>(?:the|ones?|and|then|or|before)\b)|(?P<place>(?:on|in|side)\b)"
    rf"|(?P<noun>{NOUN}s?\b)"
    r"|(?P<letter>[A-Za-z](?!\w))"
    r"|(?P<separator>[\s,;:<>()\[\]→⟶=&/-]++|\.(?=\s*+$))",
    re.IGNORECASE,
)
_NO_IMAGE = re.compile(
    r"\W*(?:both|neither|none|all|no|any|each|every|same|equal|yes|true|false|cannot|can't|can not|not|i don't know"
    r"|it is not|unknown|unclear|insufficient)\b|\W*$",
    re.IGNORECASE,
)
_SOME_IMAGE = re.compile(rf"\d|\b(?:left|right|{ORDINAL_WORD})\b", re.IGNORECASE)


def find_bare(
    text: str, rules: Collection[ReferenceRule], num_images: int, letters: Sequence[int | None]
) -> list[Reference] | None:
    """The references that make up the whole text, all of one kind among ``rules``; None if it holds anything else.

    Raises ``UserError`` for an image that does not exist.
    """
    found: list[Reference] = []
    kinds: set[ReferenceRule] = set()
    groups: set[str] = set()
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return None
        position = token.end()
        kind = str(token.lastgroup)
        groups.add(kind)
        if kind not in ("noise", "separator", "place", "noun"):
            kinds.add(ReferenceRule(kind))
            if len(kinds) > 1 or not kinds <= set(rules):
                return None
            found.append(_reference(kind, token[kind], token.start(kind), num_images, letters))
    if "position" in groups and ("noun" in groups or ("place" in groups and num_images != 2)):
        return None  # "in the middle" becomes "on the far left": a sentence, not a word
    for reference in found:
        check_existence(Phrase(0, len(text), (reference,)), text, num_images)
    return found or None


def _reference(kind: str, token: str, start: int, num_images: int, letters: Sequence[int | None]) -> Reference:
    if kind == "index":
        return number_reference(token, start)
    if kind == "ordinal":
        return ordinal_reference(token, start, num_images)
    if kind == "position":
        return position_reference(token, start, num_images)
    return letter_reference(token, start, letters)


def names_none_or_all(text: str) -> bool:
    """Whether a text says 'neither', 'both', 'none of these', 'cannot be determined' or nothing, and no more."""
    return _NO_IMAGE.match(text) is not None and _SOME_IMAGE.search(text) is None


@dataclass(frozen=True)
class WholeText:
    """What an option or an answer names that is known to name images."""

    references: list[Reference]
    bare: bool
    """Whether it consists of them; else they stand in a sentence."""


def read_whole(
    text: str,
    rules: Collection[ReferenceRule],
    num_images: int,
    letters: Sequence[int | None],
    *,
    numbers: bool = False,
) -> WholeText:
    """The references of a text that names images, or none or all of them ("neither", "both").

    ``numbers``: bare numbers are images even where ``rules`` do not include numbered references. Raises ``UserError``
    if the text names nothing that is understood, such as "the striped one".
    """
    bare = find_bare(text, {*rules, ReferenceRule.INDEX} if numbers else rules, num_images, letters)
    if bare is not None:
        return WholeText(bare, bare=True)
    references = find_references(text, rules, num_images, letters)
    if not references and not names_none_or_all(text):
        raise UserError(
            f"'{shorten(text, 60)}' should name images, but names none in a way that can follow",
            fix="declare the kind of reference that it uses, or another rule for answer and options",
        )
    return WholeText(references, bare=False)
