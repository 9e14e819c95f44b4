"""Which image slot a question is about, and which one an answer names."""

from __future__ import annotations

from collections.abc import Sequence

from perl_megatron.data.contract.bare_references import read_whole
from perl_megatron.data.contract.reference_phrases import Reference
from perl_megatron.data.contract.references import find_references
from perl_megatron.errors import UserError
from perl_megatron.reward.answers import read_index
from perl_megatron.reward.boxed import last_boxed
from perl_megatron.reward.choices import read_option
from perl_megatron.types import AnswerRule, PermutationContract, View


def expected_slot(view: View, contract: PermutationContract) -> int | None:
    """The 0-based slot of the image that the view's answer is; None where the answer is no image."""
    return _named_slot(view.answer, view, contract)


def answered_slot(response: str, view: View, contract: PermutationContract) -> int | None:
    """The slot that a response names, right or wrong; None where the answer is no image or cannot be read."""
    boxed = last_boxed(response)
    return None if boxed is None else _named_slot(boxed[:1000], view, contract)


def queried_slot(view: View, contract: PermutationContract) -> int | None:
    """The slot of the one image that the view's text refers to; None where it refers to none or several.

    Only references of the contract's kinds count ("image 2", "the second image").
    """
    try:
        references = find_references(view.text, contract.references, len(view.images))
    except UserError:
        return None
    return _only_slot(references)


def _only_slot(references: Sequence[Reference]) -> int | None:
    slots = {reference.slots for reference in references}
    if len(slots) != 1:
        return None
    only = slots.pop()
    return only[0] if len(only) == 1 else None


def _named_slot(answer: str, view: View, contract: PermutationContract) -> int | None:
    """Read as grading reads it: an option also by its text or its image, an image also as 'the second image'."""
    num_images = len(view.images)
    if contract.answer is AnswerRule.OPTION_LETTER:
        slots = view.option_slots
        index = read_option(answer, options=view.grading.options, option_slots=slots, num_images=num_images)
        return slots[index] if index is not None and index < len(slots) else None
    if contract.answer is AnswerRule.INDEX:
        number = read_index(answer, num_images)
        in_range = number is not None and number.denominator == 1 and 1 <= number <= num_images
        return int(number) - 1 if number is not None and in_range else None
    if contract.answer is AnswerRule.REFERENCES:
        try:
            return _only_slot(read_whole(answer, contract.references, num_images, range(num_images)).references)
        except UserError:
            return None
    return None
