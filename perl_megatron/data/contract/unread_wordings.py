"""Wordings that may tell images apart without being references that can follow: a guess at a contract stops at them.

A contract that somebody wrote for a record says which references its text has. One that a template gives is a guess,
and holds only if nothing else in the text depends on where an image stands: no "first panel", no "slide 2", no bare
"(B) second", and no words between the placeholders that give the images roles ("Reference: <image> Candidate: <image>",
"is <image> larger than <image>?").
"""

from __future__ import annotations

import re

from perl_megatron.data.contract.bare_references import find_bare
from perl_megatron.data.contract.options import LetteredOption, lettered_options
from perl_megatron.data.contract.ordinal_references import ORDINAL_WORD
from perl_megatron.data.contract.reference_phrases import NOUN, NUMBERS, preceded_by
from perl_megatron.data.contract.references import SENTENCE_RULES, find_references
from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER, PermutationContract, Record, ReferenceRule

_OTHER_NOUN = (
    r"(?:frame|panel|screenshot|slide|scene|view|painting|drawing|diagram|chart|graph|plot|map|scan|clip|illustration"
    r"|sketch|snapshot|shot|page|poster|card|candidate|item|x-ray|pair|set|group)s?\b"
)
_SIDE = r"(?:left|right|top|bottom|upper|lower|middle|central)(?:[- ]?most)?"
_OTHER_NAMES = re.compile(
    rf"\b(?:{ORDINAL_WORD}|{_SIDE})[\s-]++(?:\w++[\s-]++)?{_OTHER_NOUN}"
    rf"|\b{_OTHER_NOUN}\s*+(?:#?\d++|\(?(?-i:[A-Z])\b)"
    r"|(?<![a-z] )(?<![a-z])(?:#\d++|\(\d++\)|\[\d++\])",
    re.IGNORECASE,
)
_LABEL = (
    rf"(?:the\s++)?(?:{NOUN}\s*+[-_#]?(?:\s*+\(?(?:\d++|(?-i:[A-Z])\b|(?:{'|'.join(NUMBERS)})\b)\)?)?"
    rf"|(?:{ORDINAL_WORD}|left|right|middle)(?:\s++{NOUN})?)"
)
_BETWEEN = re.compile(
    rf"[\s,;.&:()<>\[\]-]*+(?:and\b\s*+)?(?:{_LABEL})?[\s,;.:()<>\[\]=-]*+(?:is\s*+:?\s*+)?", re.IGNORECASE
)
_ROLE = re.compile(
    r"\b(?:reference|query|source|original|target|anchor|template|base|before|after)\s*+(?:image|picture)?\s*+(?:is\b)?\W*+$",
    re.IGNORECASE,
)


def refuse_unread(record: Record, contract: PermutationContract) -> None:
    """Refuse a record whose text may tell its movable images apart in a way that ``contract`` does not rewrite."""
    if other := _OTHER_NAMES.search(record.text):
        raise UserError(f"'{other[0]}' may name an image", fix="write the record's contract by hand")
    options = lettered_options(record.text, None)
    texts = [record.text[option.start : option.end] for option in options] or list(record.grading.options)
    if ReferenceRule.OPTION_TEXT not in contract.references and not contract.option_slots:
        kinds = (ReferenceRule.ORDINAL, ReferenceRule.POSITION)
        for text in texts:
            if _is_bare(text, kinds, len(record.images)):
                raise UserError(f"the option '{text}' may name an image", fix="write the record's contract by hand")
    _refuse_undeclared(record, contract, options)
    _refuse_roles(record, contract, options)


def _refuse_undeclared(record: Record, contract: PermutationContract, options: list[LetteredOption]) -> None:
    """Refuse references of kinds that the contract does not rewrite. Options that stand for slots may name anything."""
    undeclared = [rule for rule in SENTENCE_RULES if rule not in contract.references]
    pieces, end = [], 0
    for option in options if contract.option_slots else ():
        pieces += [record.text[end : option.start], ";"]
        end = option.end
    text = "".join([*pieces, record.text[end:]])
    for rule in undeclared:
        if find_references(text, (rule,), len(record.images)):
            raise UserError(
                f"the text names images by '{rule.value}', which the template does not let follow",
                fix="add it to the template's references",
            )


def _is_bare(text: str, kinds: tuple[ReferenceRule, ...], num_images: int) -> bool:
    try:
        return find_bare(text, kinds, num_images, range(num_images)) is not None
    except UserError:  # names an image that the record does not have
        return True


def _refuse_roles(record: Record, contract: PermutationContract, options: list[LetteredOption]) -> None:
    """Refuse words between, or just before, placeholders of movable images that are no label and stand in no option."""
    placeholders = [match.span() for match in re.finditer(re.escape(IMAGE_PLACEHOLDER), record.text)]
    free = [
        slot
        for slot in sorted(contract.movable)
        if not any(option.start <= placeholders[slot][0] < option.end for option in options)
    ]
    words = (
        [record.text[placeholders[slot][1] : placeholders[slot + 1][0]] for slot in range(free[0], free[-1])]
        if free
        else []
    )
    roles = [role[0] for slot in free if (role := preceded_by(record.text, placeholders[slot][0], _ROLE, window=40))]
    if unread := roles + [between for between in words if not _BETWEEN.fullmatch(between)]:
        raise UserError(
            f"'{unread[0].strip()[:60]}' beside a placeholder may give its image a role",
            fix="write the record's contract by hand",
        )
