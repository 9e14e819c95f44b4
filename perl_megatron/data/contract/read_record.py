"""What a record's text, options and answer show and name, for templates to choose a contract by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from perl_megatron.data.contract.bare_references import names_none_or_all, read_whole
from perl_megatron.data.contract.options import LetteredOption, lettered_options, slots_within
from perl_megatron.data.contract.reference_phrases import Reference
from perl_megatron.data.contract.references import SENTENCE_RULES, find_references
from perl_megatron.errors import UserError
from perl_megatron.types import Record


class ReadRecord:
    """A record with what its words show, worked out where it is asked for. What cannot be understood names nothing."""

    def __init__(self, record: Record):
        self.record = record

    @cached_property
    def options(self) -> list[str]:
        """The texts of the options that the question lists by letter."""
        return [self.record.text[option.start : option.end] for option in self._listed]

    @cached_property
    def shown(self) -> list[list[int]]:
        """For each option, the slots of the images that stand in it."""
        return [slots_within(self.record.text, option) for option in self._listed]

    @cached_property
    def named(self) -> list[int | None] | None:
        """For each option the slot that it names, None where it names none or all; None if any is not understood."""
        slots: list[int | None] = []
        for text in self.options:
            if names_none_or_all(text):
                slots.append(None)
                continue
            references = self._references_of(text)
            if len(references) != 1 or len(references[0].slots) != 1:
                return None
            slots.append(references[0].slots[0])
        return slots

    @property
    def placeholders_in_options(self) -> bool:
        """Whether at least two options show one image each."""
        return sum(len(slots) == 1 for slots in self.shown) >= 2

    @property
    def names_in_options(self) -> bool:
        """Whether all options are understood, and at least two of them name an image."""
        return self.named is not None and sum(slot is not None for slot in self.named) >= 2

    @cached_property
    def names_in_answer(self) -> bool:
        """Whether the answer names images, in a sentence or as words such as 'left' and 'the second one'.

        A number or a letter alone may be anything.
        """
        references = self._references_of(self.record.answer, numbers=False)
        return bool(references) and not re.fullmatch(r"\W*(?:\d+|[A-Za-z])\W*", self.record.answer)

    @cached_property
    def names_images(self) -> bool:
        """Whether anything in text or answer names an image."""
        try:
            found = find_references(self.record.text, SENTENCE_RULES, len(self.record.images))
        except UserError:  # something does, in a way that cannot follow
            return True
        return bool(found) or self.names_in_answer or self.names_in_options

    @cached_property
    def _listed(self) -> list[LetteredOption]:
        return lettered_options(self.record.text, None)

    def _references_of(self, text: str, *, numbers: bool = True) -> list[Reference]:
        num_images = len(self.record.images)
        try:
            return read_whole(text, SENTENCE_RULES, num_images, range(num_images), numbers=numbers).references
        except UserError:
            return []


def option_images(read: ReadRecord, how: str, movable: Sequence[int]) -> tuple[int | None, ...]:
    """The slot of each option; None for one that is no image. ``how``: 'placeholders', 'named' or 'in_order'.

    Raises ``UserError`` if the options are not of that form.
    """
    if how == "placeholders":
        if any(len(slots) > 1 for slots in read.shown):
            raise UserError("an option shows several images")
        return tuple(slots[0] if slots else None for slots in read.shown)
    if how == "named":
        if read.named is None:
            raise UserError("an option does not name one image")
        return tuple(read.named)
    if not read.options:
        return tuple(movable)
    stands = [not names_none_or_all(text) for text in read.options]
    if sum(stands) != len(movable):
        raise UserError(f"{sum(stands)} options do not stand for {len(movable)} images")
    images = iter(movable)
    return tuple(next(images) if stands_for_one else None for stands_for_one in stands)
