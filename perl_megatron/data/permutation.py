"""The permutation contract: whether a record keeps its meaning when its images move, and the view that results.

PeRL's Eq. 1: ŷ = S(x, x̂)·y + (1 − S)·Λ(y, σ). Here S and Λ are the record's contract. Unlike the released code, which
never edits the text and changes answers by rules hard-coded for each dataset, the images move behind fixed
placeholders, the text's references follow them, and the answer is transformed by a general rule; records for which that
is not well defined are refused. See docs/permutation.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from perl_megatron.data.contract.answer_transform import answer_references, check_answer, transform_answer
from perl_megatron.data.contract.options import check_inline_images
from perl_megatron.data.contract.reference_phrases import Reference
from perl_megatron.data.contract.text_references import MovingReferences, follow, moving_references
from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER, AnswerRule, Record, View


def validate_contract(record: Record) -> None:
    """Refuse a record whose images, text, answer and contract contradict each other.

    The orders are tried as well: each view has to read back as the record does. Raises ``UserError`` naming the record;
    a record that passes can be given to ``apply_order`` with any order of its movable slots.
    """
    try:
        _check_slots(record)
        check_answer(record)
        moving = moving_references(record)
        check_inline_images(record)
        if record.contract.permutable:
            _try_orders(record, moving)
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
    """The view of ``record`` whose slot i shows ``record.images[order[i]]``; text, options and answer follow.

    ``record`` has passed ``validate_contract``; ``order`` moves movable slots only.
    """
    order = tuple(int(slot) for slot in order)
    assert sorted(order) == list(range(len(record.images))), f"{order} is not an order of {len(record.images)} images"
    moved = {new for new, old in enumerate(order) if new != old}
    assert moved <= set(record.contract.movable), f"order {order} moves slots that {record.id} does not let move"
    return _view(record, order, index, moving_references(record) if moved else None)


def _view(record: Record, order: tuple[int, ...], index: int, moving: MovingReferences | None) -> View:
    """The view; ``moving`` is None for the original order, in which no character changes."""
    text, answer, grading = record.text, record.answer, record.grading
    if moving is not None:
        new_slots = invert(order)
        text, options = follow(record, moving, new_slots)
        grading = replace(grading, options=options) if options else grading
        answer = transform_answer(record, new_slots)
    return View(
        record_id=record.id,
        index=index,
        order=order,
        images=tuple(record.images[old] for old in order),
        text=text,
        answer=answer,
        answer_type=record.answer_type,
        kind=record.kind,
        grading=grading,
        option_slots=record.contract.option_slots,
    )


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


def _try_orders(record: Record, moving: MovingReferences) -> None:
    """Refuse a record with a view that reads differently: another reference, or one more or less, than it was given.

    Nothing can go wrong where no reference moves: letters and numbers of answers are mapped one to one.
    """
    in_answer = record.contract.answer is AnswerRule.REFERENCES
    if not moving and not in_answer:
        return
    expected = _reading(record, moving, range(len(record.images)))
    for order in _orders_to_try(record):
        view = _view(record, order, 1, moving)
        moved = replace(record, images=view.images, text=view.text, answer=view.answer, grading=view.grading)
        try:
            same = _reading(moved, moving_references(moved), order) == expected
        except UserError as error:
            raise UserError(f"in the order {list(order)}: {error.what}", fix=error.fix) from error
        if not same:
            raise UserError(
                f"in the order {list(order)} the text reads differently: '{view.text[-200:]}'",
                fix="name each image by its number, or let fewer images move",
            )


def _orders_to_try(record: Record) -> list[tuple[int, ...]]:
    """The movable slots rotated by one either way: every reference that moves comes to name two other slots.

    More would not find more: a reference is rewritten alone, and the rest of the text stays.
    """
    movable = sorted(record.contract.movable)
    orders = []
    for shift in {1, len(movable) - 1}:
        arrangement = movable[shift:] + movable[:shift]
        order = list(range(len(record.images)))
        for slot, old_slot in zip(movable, arrangement, strict=True):
            order[slot] = old_slot
        orders.append(tuple(order))
    return orders


def _reading(record: Record, moving: MovingReferences, images: Sequence[int]) -> list[object]:
    """What text, options and answer say of the images themselves: their words, and which image each reference means.

    ``images[slot]`` is the image that the slot shows.
    """
    parts = [(record.text, moving.text), *zip(record.grading.options, moving.options, strict=True)]
    if record.contract.answer is AnswerRule.REFERENCES:
        parts.append((record.answer, answer_references(record)))
    return [piece for text, references in parts for piece in _pieces(text, references, images)]


def _pieces(text: str, references: list[Reference], images: Sequence[int]) -> list[object]:
    pieces: list[object] = []
    end = 0
    for reference in references:
        named = [images[slot] for slot in reference.slots]
        if reference.render is None:  # a set keeps its words, and its images in whichever order
            pieces.append(frozenset(named))
        else:
            pieces += [text[end : reference.start], named[0]]
            end = reference.end
    return [*pieces, text[end:]]
