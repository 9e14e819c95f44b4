"""The lettered options of a question: where they stand in its text, and which of them are images.

An option is an image if the contract gives its slot (``option_slots``): "(A) <image>", "(A) image 1", or a bare letter
that a prompt maps to an image. Its text stays and the answer's letter follows the image; the text of all other options
follows as the question does.
"""

from __future__ import annotations

import re

from perl_megatron.data.reference_phrases import Reference
from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER, AnswerRule, Record

_MARKER = re.compile(r"\(([A-Z])\)|(?<![^\s,;])([A-Z])[).:=]")
_NO_BREAK = re.compile(r"\s*")


def letter(index: int) -> str:
    """'A' for 0."""
    return chr(ord("A") + index)


def option_spans(text: str, count: int | None) -> list[tuple[int, int]]:
    """Where the text of each option A, B, … stands, (start, end); empty if the text does not list them by letter.

    Options are marked '(A)', 'A.', 'A)', 'A:' or 'A='. The last chain of ``count`` letters is taken (None: the longest
    chain of at least two), since a question can hold a letter of its own, and an option the letters of others. The last
    option ends with its line.
    """
    markers = list(_MARKER.finditer(text))
    following: list[int | None] = [None] * len(markers)
    lengths = [1] * len(markers)
    nearest: dict[str, int] = {}
    for number in reversed(range(len(markers))):
        own = markers[number][1] or markers[number][2]
        following[number] = after = nearest.get(chr(ord(own) + 1))
        lengths[number] = 1 + (0 if after is None else lengths[after])
        nearest[own] = number
    starts = [number for number, marker in enumerate(markers) if (marker[1] or marker[2]) == "A"]
    enough = [number for number in starts if lengths[number] >= (count or 2)]
    if not enough:
        return []
    current: int | None = enough[-1] if count else max(enough, key=lambda number: (lengths[number], number))
    spans: list[tuple[int, int]] = []
    while current is not None and len(spans) < (count or 26):
        after, start = following[current], markers[current].end()
        spans.append((start, _line_end(text, start) if after is None else markers[after].start()))
        current = after
    return spans


def _line_end(text: str, start: int) -> int:
    """The end of the line on which the first word after ``start`` stands."""
    first_word = _NO_BREAK.match(text, start)
    assert first_word is not None
    end = text.find("\n", first_word.end())
    return len(text) if end < 0 else end


def slots_within(text: str, span: tuple[int, int]) -> list[int]:
    """The slots of the placeholders in a part of the text."""
    first = text.count(IMAGE_PLACEHOLDER, 0, span[0])
    return list(range(first, first + text.count(IMAGE_PLACEHOLDER, *span)))


def check_option_slots(record: Record) -> None:
    """Refuse ``option_slots`` that contradict the answer, the movable slots, or the placeholders in the options."""
    options, answer, movable = record.contract.option_slots, record.answer, set(record.contract.movable)
    letters = [letter(index) for index in range(len(options))]
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


def check_inline_images(record: Record) -> None:
    """Refuse options that show movable images, '(A) <image> (B) <image>', but that the contract does not say to be."""
    contract = record.contract
    by_letter = contract.answer is AnswerRule.OPTION_LETTER
    if not contract.permutable or not (by_letter or re.fullmatch("[A-Z]", record.answer)):
        return
    spans = option_spans(record.text, len(contract.option_slots) or None)
    for index, span in enumerate(spans):
        shown = slots_within(record.text, span)
        expected = contract.option_slots[index] if by_letter else None
        if len(shown) == 1 and shown[0] in contract.movable and shown[0] != expected:
            raise UserError(
                f"option {letter(index)} shows the image of slot {shown[0]}, which moves, but the contract "
                + ("says nothing of it" if expected is None else f"gives slot {expected}"),
                fix="use the answer rule 'option_letter' with the slot of each option",
            )


def check_named_slots(record: Record, spans: list[tuple[int, int]], references: list[Reference]) -> None:
    """Refuse an option whose text names another image than the contract does."""
    for slot, (start, end) in zip(record.contract.option_slots, spans, strict=False):
        named = [reference.slots for reference in references if start <= reference.start < end]
        if slot is not None and any(slots != (slot,) for slots in named):
            raise UserError(
                f"option '{record.text[start:end].strip()}' names another image than its slot {slot}",
                fix="option_slots are counted from 0, image numbers in the text from 1",
            )
