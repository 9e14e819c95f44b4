"""The permutation contract: whether a record keeps its meaning when its images move, and the view that results.

PeRL's Eq. 1: ŷ = S(x, x̂)·y + (1 − S)·Λ(y, σ). Here S and Λ are the record's contract. Unlike the released code, which
never edits the text and changes answers by rules hard-coded for each dataset, the images move behind fixed
placeholders, the text's references follow them, and the answer is transformed by a general rule; records for which that
is not well defined are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from perl_megatron.data.references import Reference, find_references, rewrite_references
from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER, AnswerRule, Record, ReferenceRule, View

_ORDERING_ANSWER = re.compile(r"[\s,;<>()\[\]→-]*\d+(?:[\s,;<>()\[\]→-]+\d+)*[\s,;<>()\[\]→-]*")
_INDEX_ANSWER = re.compile(r"\s*(?:(?:image|picture|figure|photo)\s+)?\d+\s*\.?\s*", re.IGNORECASE)


def validate_contract(record: Record) -> None:
    """Refuse a record whose images, text, answer and contract contradict each other.

    Raises ``UserError`` naming the record; a record that passes can be given to ``apply_order`` with any order of its
    movable slots.
    """
    try:
        _check_slots(record)
        if record.contract.answer is AnswerRule.OPTION_LETTER:
            _check_options(record)
        elif record.contract.option_slots:
            raise UserError(
                f"option_slots is set, but the answer rule is '{record.contract.answer.value}'",
                fix="use the answer rule 'option_letter', or leave option_slots out",
            )
        if record.contract.answer in (AnswerRule.ORDERING, AnswerRule.INDEX):
            _check_numbers(record)
        _moving_references(record)
    except UserError as error:
        raise UserError(error.what, where=record.source or f"record '{record.id}'", fix=error.fix) from error


def num_orders(record: Record) -> int:
    """How many image orders the record has, the original included: (number of movable slots)!, or 1."""
    return math.factorial(len(record.contract.movable)) if record.contract.permutable else 1


def invert(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes ``order``; it also gives, for each old slot, the new slot of its image."""
    new_slots = [0] * len(order)
    for new_slot, old_slot in enumerate(order):
        new_slots[old_slot] = new_slot
    return tuple(new_slots)


def apply_order(record: Record, order: Sequence[int], index: int) -> View:
    """The view of ``record`` whose slot i shows ``record.images[order[i]]``; text and answer follow the contract.

    ``record`` has passed ``validate_contract``; ``order`` moves movable slots only.
    """
    order = tuple(int(slot) for slot in order)
    assert sorted(order) == list(range(len(record.images))), f"{order} is not an order of {len(record.images)} images"
    moved = {new for new, old in enumerate(order) if new != old}
    assert moved <= set(record.contract.movable), f"order {order} moves slots that {record.id} does not let move"
    new_slots = invert(order)
    return View(
        record_id=record.id,
        index=index,
        order=order,
        images=tuple(record.images[old] for old in order),
        text=rewrite_references(record.text, _moving_references(record), new_slots) if moved else record.text,
        answer=_transform_answer(record, new_slots) if moved else record.answer,
        answer_type=record.answer_type,
        kind=record.kind,
        grading=record.grading,
        option_slots=record.contract.option_slots,
    )


def _transform_answer(record: Record, new_slots: Sequence[int]) -> str:
    """Λ(y, σ): the answer after the image of slot s has moved to ``new_slots[s]``."""
    contract = record.contract
    if contract.answer is AnswerRule.UNCHANGED:
        return record.answer
    if contract.answer is AnswerRule.OPTION_LETTER:
        slot = contract.option_slots[_letter_index(record.answer)]
        return record.answer if slot is None else _letter(contract.option_slots.index(new_slots[slot]))
    return re.sub(r"\d+", lambda number: str(new_slots[int(number[0]) - 1] + 1), record.answer)


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _letter_index(letter: str) -> int:
    return ord(letter) - ord("A")


def _check_slots(record: Record) -> None:
    placeholders, num_images = record.text.count(IMAGE_PLACEHOLDER), len(record.images)
    if placeholders != num_images:
        raise UserError(
            f"the text has {placeholders} {IMAGE_PLACEHOLDER} placeholders for {num_images} images",
            fix=f"write {IMAGE_PLACEHOLDER} once for each image",
        )
    movable = record.contract.movable
    if len(set(movable)) != len(movable):
        raise UserError(f"movable slots {list(movable)} name a slot twice", fix="list each slot once")
    if any(not 0 <= slot < num_images for slot in movable):
        raise UserError(
            f"movable slots {list(movable)} are not all among the slots of {num_images} images",
            fix="slots are counted from 0",
        )


def _check_options(record: Record) -> None:
    options, answer, movable = record.contract.option_slots, record.answer, set(record.contract.movable)
    letters = [_letter(index) for index in range(len(options))]
    if not 1 <= len(options) <= 26:
        raise UserError(
            "the answer rule 'option_letter' needs 1 to 26 option_slots", fix="give one slot for each option"
        )
    if answer not in letters:
        raise UserError(
            f"the answer '{answer}' is not one of the letters {', '.join(letters)}", fix="write the letter alone"
        )
    slots = [slot for slot in options if slot is not None]
    if len(set(slots)) != len(slots):
        raise UserError(f"option_slots {list(options)} name a slot twice", fix="give each option its own slot")
    if any(not 0 <= slot < len(record.images) for slot in slots):
        raise UserError(f"option_slots {list(options)} name a slot that does not exist", fix="slots are counted from 0")
    if record.contract.permutable and movable & set(slots) and not movable <= set(slots):
        raise UserError(
            f"movable slots {sorted(movable)} mix images that are options with others that are not",
            fix="an option's image could move to a slot without a letter: let only options move, or only others",
        )
    numbers = find_references(record.text, (ReferenceRule.INDEX,), len(record.images))
    for slot, (start, end) in zip(options, _option_spans(record), strict=False):
        named = [reference.slots for reference in numbers if start <= reference.start < end]
        if slot is not None and any(slots != (slot,) for slots in named):
            raise UserError(
                f"option '{record.text[start:end].strip()}' names another image than its slot {slot}",
                fix="option_slots are counted from 0, image numbers in the text from 1",
            )


def _check_numbers(record: Record) -> None:
    rule = record.contract.answer
    pattern, shape = (
        (_ORDERING_ANSWER, "a list of image numbers such as '3, 1, 2'")
        if rule is AnswerRule.ORDERING
        else (_INDEX_ANSWER, "one image number such as '2'")
    )
    if not pattern.fullmatch(record.answer):
        raise UserError(f"the answer '{record.answer}' is not {shape}", fix=f"the answer rule is '{rule.value}'")
    numbers = [int(number) for number in re.findall(r"\d+", record.answer)]
    if any(not 1 <= number <= len(record.images) for number in numbers):
        raise UserError(
            f"the answer '{record.answer}' names an image that does not exist: the record has {len(record.images)}",
            fix="image numbers are counted from 1",
        )
    if len(set(numbers)) != len(numbers):
        raise UserError(f"the answer '{record.answer}' names an image twice", fix="name each image once")


def _moving_references(record: Record) -> list[Reference]:
    """The text's references that follow the images: not those inside an option that stands for a slot."""
    contract, movable = record.contract, set(record.contract.movable)
    references = find_references(record.text, contract.references, len(record.images))
    if not contract.permutable:
        return references
    for reference in references:
        if reference.render is None and movable & set(reference.slots) and not movable <= set(reference.slots):
            raise UserError(
                f"'{record.text[reference.start : reference.end]}' names a set of images that others can move into",
                fix="write the image numbers out",
            )
    if contract.answer is not AnswerRule.OPTION_LETTER or not movable & set(contract.option_slots):
        return references
    spans = _option_spans(record)
    kept = [span for span, slot in zip(spans, contract.option_slots, strict=False) if slot is not None]
    moving = [item for item in references if not any(start <= item.start < end for start, end in kept)]
    if not spans and any(movable & set(item.slots) for item in moving):
        raise UserError(
            "cannot tell the options from the question: the text refers to images that are options",
            fix="write the options as '(A) …' or 'A. …', one after the other",
        )
    return moving


def _option_spans(record: Record) -> list[tuple[int, int]]:
    """Where each option's text stands, (start, end); empty if the text does not list the options by letter.

    Searched from the text's end, since a question can hold a letter of its own.
    """
    spans: list[tuple[int, int]] = []
    line_end = record.text.find(
        "\n", _last_marker(record.text, len(record.contract.option_slots) - 1, len(record.text))[1]
    )
    boundary = len(record.text) if line_end < 0 else line_end
    for index in reversed(range(len(record.contract.option_slots))):
        start, end = _last_marker(record.text, index, boundary)
        if start < 0:
            return []
        spans.insert(0, (end, boundary))
        boundary = start
    return spans


def _last_marker(text: str, index: int, boundary: int) -> tuple[int, int]:
    """(start, end) of the last '(A)', 'A.', 'A)', 'A:' or 'A=' before ``boundary``; (-1, 0) if there is none."""
    letter = _letter(index)
    markers = list(re.finditer(rf"\({letter}\)|(?<![^\s,;]){letter}[).:=]", text[:boundary]))
    return markers[-1].span() if markers else (-1, 0)
