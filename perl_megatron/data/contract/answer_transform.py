"""Λ(y, σ) of PeRL's Eq. 1: how a record's answer follows its images, by the contract's ``AnswerRule``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from perl_megatron.data.contract.bare_references import read_whole
from perl_megatron.data.contract.options import check_option_slots, letter
from perl_megatron.data.contract.reference_phrases import Reference, as_number
from perl_megatron.data.contract.references import rewrite_references
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, Record

_SEPARATOR = r"[\s,;<>()\[\]→-]"
_ORDERING = re.compile(rf"{_SEPARATOR}*+\d++(?:{_SEPARATOR}++\d++)*+{_SEPARATOR}*+")
_INDEX = re.compile(r"\s*+(?:(?:image|picture|figure|photo)\s++)?\d++\s*+\.?\s*+", re.IGNORECASE)


def transform_answer(record: Record, new_slots: Sequence[int]) -> str:
    """The answer after the image of slot s has moved to ``new_slots[s]``."""
    contract = record.contract
    if contract.answer is AnswerRule.UNCHANGED:
        return record.answer
    if contract.answer is AnswerRule.OPTION_LETTER:
        slot = contract.option_slots[ord(record.answer) - ord("A")]
        return record.answer if slot is None else letter(contract.option_slots.index(new_slots[slot]))
    if contract.answer is AnswerRule.REFERENCES:
        return rewrite_references(record.answer, answer_references(record), new_slots)
    return re.sub(r"\d+", lambda number: str(new_slots[int(number[0]) - 1] + 1), record.answer)


def image_letters(record: Record) -> Sequence[int | None]:
    """The slot that each letter names: that of the option, where options are images, else the images in turn."""
    options = record.contract.option_slots
    return range(len(record.images)) if all(slot is None for slot in options) else options


def answer_references(record: Record) -> list[Reference]:
    """For the rule ``REFERENCES``: where the answer names images. Raises ``UserError`` if it does not."""
    rules, letters = record.contract.references, image_letters(record)
    return read_whole(record.answer, rules, len(record.images), letters).references


def check_answer(record: Record) -> None:
    """Refuse an answer that is not of its rule's form, or names images that do not exist."""
    contract = record.contract
    if contract.answer is AnswerRule.OPTION_LETTER:
        check_option_slots(record)
    elif contract.option_slots:
        raise UserError(
            f"option_slots is set, but the answer rule is '{contract.answer.value}'",
            fix="use the answer rule 'option_letter', or leave option_slots out",
        )
    if contract.answer in (AnswerRule.ORDERING, AnswerRule.INDEX):
        _check_numbers(record)
    if contract.answer is AnswerRule.REFERENCES:
        if not contract.references:
            raise UserError(
                "the answer rule 'references' needs the kinds of reference", fix="list them under contract.references"
            )
        answer_references(record)
    if contract.answer is AnswerRule.NOT_PERMUTABLE and contract.movable:
        raise UserError(
            f"the contract is not permutable, but lets slots {list(contract.movable)} move", fix="leave movable out"
        )
    if contract.reason and contract.answer is not AnswerRule.NOT_PERMUTABLE:
        raise UserError(
            f"the contract gives a reason not to permute, but its answer rule is '{contract.answer.value}'",
            fix="use the answer rule 'not_permutable', or leave the reason out",
        )


def _check_numbers(record: Record) -> None:
    rule = record.contract.answer
    pattern, shape = (
        (_ORDERING, "a list of image numbers such as '3, 1, 2'")
        if rule is AnswerRule.ORDERING
        else (_INDEX, "one image number such as '2'")
    )
    if not pattern.fullmatch(record.answer):
        raise UserError(f"the answer '{record.answer}' is not {shape}", fix=f"the answer rule is '{rule.value}'")
    numbers = [as_number(number) for number in re.findall(r"\d+", record.answer)]
    if any(not 1 <= number <= len(record.images) for number in numbers):
        raise UserError(
            f"the answer '{record.answer}' names an image that does not exist: the record has {len(record.images)}",
            fix="image numbers are counted from 1",
        )
    if len(set(numbers)) != len(numbers):
        raise UserError(f"the answer '{record.answer}' names an image twice", fix="name each image once")
