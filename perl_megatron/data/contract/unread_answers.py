"""Answers and options that may name images by a bare number or letter: a guess at a contract stops at them.

"2" answers "How many dogs are there?" in every order of the images, and "Which one does not belong?" in one of them.
So a template's contract that leaves such an answer as it is needs a question that asks for a quantity, one that lets it
follow a question that does not, and bare words such as "left" follow only where the question asks for an image.
"""

from __future__ import annotations

import re

from perl_megatron.data.contract.bare_references import find_bare
from perl_megatron.data.contract.options import lettered_options
from perl_megatron.data.contract.reference_phrases import NOUN, NUMBERS
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, PermutationContract, Record, ReferenceRule

_HOW_MUCH = re.compile(r"\bhow\s++(?:many|much|old|long|tall|far|often|high|wide|deep|fast|heavy)\b", re.IGNORECASE)
_QUANTITY = re.compile(
    r"\b(?:(?:what|who)(?:'s|\s++(?:is|are|was|were))|calculate|compute|determine|find|give|count)\s++(?:the\s++)?"
    r"(?:\w++\s++)?(?:sum|total|difference|product|average|ratio|percentage|amount"
    rf"|(?:count|number)\s++of(?!\s++(?:the|this|that|an?|each|every)\b(?!\s++{NOUN}s\b)))\b"
    r"|\b(?:what|which)\s++number\s++(?:of|appears|(?:is|are)\s++(?:shown|written|displayed|visible|printed|seen|in|on))\b"
    r"|\bcount\s++(?:the|all)\s++(?!images?\b|pictures?\b|photos?\b)",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"\bwhich\b(?!\s++number\s++(?:of|is|are|appears)\b)|\b(?:whose|index|indices|position|odd|belongs?|select"
    r"|choose|pick|identify|name|rank)\b"
    rf"|(?<!many )\b(?:{NOUN}s?|ones?)\s++(?:with|that|which|whose|where|showing|containing|having|out)\b",
    re.IGNORECASE,
)
_ASKS_FOR_AN_IMAGE = re.compile(
    r"\b(?:which|what|select|choose|pick|identify|find)\s++(?:the\s++)?(?:one\s++)?(?:of\s++)?"
    rf"(?:(?:the|these|those)\s++)?(?:(?:{'|'.join(NUMBERS)}|\d++)\s++)?(?:{NOUN}s?|one)\b"
    rf"|\b(?:index|number)\s++of\s++the\s++{NOUN}\b|\b{NOUN}\s++(?:number|index|id)\b",
    re.IGNORECASE,
)
_AROUND = re.compile(r"\b(?:only|just|both|neither|nor|options?|choices?|numbers?|no\.|nr\.|answers?)(?!\w)", re.I)
_WORD = re.compile(rf"\b(?:zero|{'|'.join(NUMBERS)})\b", re.IGNORECASE)


def refuse_unread_answer(record: Record, contract: PermutationContract) -> None:
    """Refuse a bare answer, or bare options, that ``contract`` may take for what they are not."""
    if contract.option_slots:
        return
    options = lettered_options(record.text, None)
    question = record.text[: options[0].marker] + " " + record.text[options[-1].end :] if options else record.text
    texts = [record.text[option.start : option.end] for option in options] or list(record.grading.options)
    if contract.answer is AnswerRule.UNCHANGED and ReferenceRule.OPTION_TEXT not in contract.references:
        _check_stays(record, question, texts)
    elif _HOW_MUCH.search(question):
        _check_no_quantity(record, contract, texts)
    if contract.answer is AnswerRule.REFERENCES and not _ASKS_FOR_AN_IMAGE.search(question):
        kinds = (ReferenceRule.INDEX, ReferenceRule.ORDINAL, ReferenceRule.POSITION, ReferenceRule.LETTER)
        if any(find_bare(record.answer, (kind,), len(record.images), range(26)) for kind in kinds):
            raise _may_be(record.answer, "be something else than an image")


def _check_stays(record: Record, question: str, options: list[str]) -> None:
    """Refuse what may name an image though it stays as it is."""
    asks_for_a_quantity = bool(_HOW_MUCH.search(question) or _QUANTITY.search(question))
    asks_for_a_quantity = asks_for_a_quantity and not _CHOICE.search(question)
    suspects = [(text, ReferenceRule.LETTER) for text in options or [record.answer]]
    if not asks_for_a_quantity:
        suspects += [(text, ReferenceRule.INDEX) for text in (*options, record.answer)]
    for text, kind in suspects:
        if names_a_slot(text, kind, len(record.images)):
            raise _may_be(text, "name an image")


def _check_no_quantity(record: Record, contract: PermutationContract, options: list[str]) -> None:
    """Refuse what may be a quantity though it follows the images."""
    texts = [record.answer] if contract.answer in (AnswerRule.INDEX, AnswerRule.REFERENCES) else []
    if ReferenceRule.OPTION_TEXT in contract.references:
        texts += options
    for text in texts:
        if names_a_slot(text, ReferenceRule.INDEX, len(record.images)):
            raise _may_be(text, "be a quantity")


def names_a_slot(text: str, kind: ReferenceRule, num_images: int) -> bool:
    """Whether a text is nothing but a number (0 included, digits or words) or a letter that may name an image."""
    text = _AROUND.sub(" ", text)
    if kind is ReferenceRule.INDEX:
        text = _WORD.sub(lambda word: str(["zero", *NUMBERS].index(word[0].lower())), text)
    try:
        found = find_bare(text.lstrip("+"), (kind,), 10**7, range(26))
    except UserError:  # image 0
        return True
    return any(reference.slots[0] < num_images for reference in found or ())


def _may_be(text: str, what: str) -> UserError:
    return UserError(f"'{text[:60]}' may {what}", fix="write the record's contract by hand")
