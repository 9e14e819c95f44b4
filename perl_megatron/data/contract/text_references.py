"""Which references in a record's text and options follow its images under its contract, and the texts that result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perl_megatron.data.contract.answer_transform import image_letters
from perl_megatron.data.contract.bare_references import WholeText, read_whole
from perl_megatron.data.contract.options import (
    LetteredOption,
    check_mentioned_letters,
    check_named_slots,
    letter,
    lettered_options,
)
from perl_megatron.data.contract.reference_phrases import Reference
from perl_megatron.data.contract.references import find_references, refuse_relative, rewrite_references
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, Record, ReferenceRule


@dataclass(frozen=True)
class MovingReferences:
    """The references that are rewritten when images move (sets included, which stay)."""

    text: list[Reference]
    options: list[list[Reference]]
    """For each text of ``record.grading.options``; empty for an option that stands for a slot."""

    def __bool__(self) -> bool:
        return bool(self.text) or any(self.options)


def moving_references(record: Record) -> MovingReferences:
    """Find them. Raises ``UserError`` for wordings that cannot follow, and for options that contradict the text."""
    contract = record.contract
    listed = _listed_options(record)
    references = _text_references(record, listed)
    if contract.permutable:
        _check_sets(record.text, references, set(contract.movable))
    check_mentioned_letters(record, listed)
    moving = references
    if stays := [option for option, slot in zip(listed, contract.option_slots, strict=False) if slot is not None]:
        check_named_slots(record, listed, _named_by_number_too(record, references))
        moving = [item for item in references if not any(option.holds(item) for option in stays)]
    elif _options_move(record) and any(item.render and item.slots[0] in contract.movable for item in references):
        raise UserError(
            "cannot tell the options from the question: the text refers to images that are options",
            fix="write the options as '(A) …' or 'A. …', one after the other",
        )
    return MovingReferences(moving, _grading_references(record, listed, references))


def follow(record: Record, moving: MovingReferences, new_slots: Sequence[int]) -> tuple[str, tuple[str, ...]]:
    """The text and the options' texts after the image of slot s has moved to ``new_slots[s]``."""
    options = tuple(
        rewrite_references(text, references, new_slots)
        for text, references in zip(record.grading.options, moving.options, strict=True)
    )
    return rewrite_references(record.text, moving.text, new_slots), options


def _options_move(record: Record) -> bool:
    contract = record.contract
    return (
        contract.permutable
        and contract.answer is AnswerRule.OPTION_LETTER
        and not set(contract.movable).isdisjoint(contract.option_slots)
    )


def _listed_options(record: Record) -> list[LetteredOption]:
    """The options that the text lists, where its references matter or options are images."""
    contract = record.contract
    if not contract.option_slots and not contract.references:
        return []
    listed = lettered_options(record.text, len(contract.option_slots or record.grading.options) or None)
    if ReferenceRule.OPTION_TEXT in contract.references and not listed:
        raise UserError(
            "the contract says that options name images, but the text lists no options",
            fix="write the options as '(A) …' or 'A. …', one after the other",
        )
    return listed


def _sentence_rules(record: Record) -> list[ReferenceRule]:
    return [rule for rule in record.contract.references if rule is not ReferenceRule.OPTION_TEXT]


def _text_references(record: Record, listed: list[LetteredOption]) -> list[Reference]:
    """All references of the text, option by option: no phrase goes on from one option into the next.

    Options that consist of references are read first, and not as part of a sentence.
    """
    rules, bare = _sentence_rules(record), list[Reference]()
    pieces, end = [], 0
    for option in listed:
        pieces += [record.text[end : option.marker], ";" * (option.start - option.marker)]
        end = option.start
        if ReferenceRule.OPTION_TEXT in record.contract.references:
            read = _read_option(record, record.text[option.start : option.end])
            if read.bare:
                bare += [item.moved(option.start) for item in read.references]
                pieces.append(";" * (option.end - option.start))
                end = option.end
    if not rules:
        return bare
    text = "".join([*pieces, record.text[end:]])
    if record.contract.permutable:
        refuse_relative(text, all_move=len(record.contract.movable) == len(record.images))
    found = find_references(text, rules, len(record.images), image_letters(record))
    return sorted([*bare, *found], key=lambda reference: reference.start) if bare else found


def _read_option(record: Record, text: str) -> WholeText:
    """What an option names that names images."""
    return read_whole(text, _sentence_rules(record), len(record.images), image_letters(record), numbers=True)


def _named_by_number_too(record: Record, references: list[Reference]) -> list[Reference]:
    """The text's references, those by number included where the contract does not declare them."""
    if ReferenceRule.INDEX in record.contract.references:
        return references
    return [*references, *find_references(record.text, (ReferenceRule.INDEX,), len(record.images))]


def _check_sets(text: str, references: list[Reference], movable: set[int]) -> None:
    for reference in references:
        slots = set(reference.slots)
        if reference.render is None and movable & slots and not movable <= slots:
            raise UserError(
                f"'{text[reference.start : reference.end]}' names a set of images that others can move into",
                fix="write the image numbers out",
            )


def _grading_references(
    record: Record, listed: list[LetteredOption], references: list[Reference]
) -> list[list[Reference]]:
    """What each of ``grading.options`` names; nothing where it stands for a slot. It has to agree with the text."""
    texts, slots = record.grading.options, record.contract.option_slots
    if not record.contract.references:
        return [[] for _ in texts]
    found: list[list[Reference]] = []
    for index, text in enumerate(texts):
        if index < len(slots) and slots[index] is not None:
            found.append([])
            continue
        option = listed[index] if len(listed) == len(texts) else None
        shown = [item for item in references if option is not None and option.holds(item)]
        if option is not None and record.text[option.start : option.end] == text:
            found.append([item.moved(-option.start) for item in shown])
            continue
        graded = _graded_references(record, text)
        if option is not None and [item.slots for item in shown] != [item.slots for item in graded]:
            raise UserError(
                f"option {letter(index)} names other images in the text, "
                f"'{record.text[option.start : option.end]}', than in grading.options, '{text}'",
                fix="give the options' texts as the question shows them",
            )
        found.append(graded)
    return found


def _graded_references(record: Record, text: str) -> list[Reference]:
    """What an option's text names that the question does not show in the same words."""
    if ReferenceRule.OPTION_TEXT in record.contract.references:
        references = _read_option(record, text).references
    else:
        references = find_references(text, _sentence_rules(record), len(record.images), image_letters(record))
    if record.contract.permutable:
        _check_sets(text, references, set(record.contract.movable))
    return references
