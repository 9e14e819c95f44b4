"""Which option of a multiple-choice question an answer names: by letter, by text, or by the image it stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from perl_megatron.reward.answers import plain_answer, read_choice, read_image, read_text

_LETTER_AND_MORE = re.compile(
    r"(?:(?:option|choice|answer)\b\s*:?\s*)?(?:\(\s*([a-z])\s*\)\s*[.:]?|([a-z])\s*(?:[).:]|-(?=\s)))\s*(\S.*)",
    re.IGNORECASE | re.DOTALL,
)


def read_option(
    answer: str, *, options: Sequence[str] = (), option_slots: Sequence[int | None] = (), num_images: int = 0
) -> int | None:
    """The 0-based option that ``answer`` names, or None where it names none, or more than one.

    Args:
        answer: 'B', '(B)', 'Option B'; an option's text; 'image 2' or 'the second image' for the option whose slot is
            1; or a letter with one of the latter two, which must agree: 'B. two dogs', '(B) image 2'.
        options: the options' texts, compared without case and runs of white space. A text that two options have names
            neither.
        option_slots: the 0-based image slot that each option stands for; None for one that is no image.
        num_images: for 'the last image'.

    A letter alone is always a letter, also where some option's text is a letter.
    """
    letter = read_choice(answer)
    if letter is not None:
        return _index(letter)
    named = _named(answer, options, option_slots, num_images)
    both = _LETTER_AND_MORE.fullmatch(plain_answer(answer))
    if both is not None:
        index = _index((both[1] or both[2]).upper())
        rest = both[3][1:-1] if both[3].startswith("(") and both[3].endswith(")") else both[3]
        if index in _named(both[3], options, option_slots, num_images) | _named(
            rest, options, option_slots, num_images
        ):
            named.add(index)
    return named.pop() if len(named) == 1 else None


def _named(answer: str, options: Sequence[str], option_slots: Sequence[int | None], num_images: int) -> set[int]:
    """All options whose text or whose image this is."""
    text, image = _text(answer), read_image(answer, num_images)
    named = {index for index, option in enumerate(options) if text and _text(option) == text}
    if image is not None:
        named |= {index for index, slot in enumerate(option_slots) if slot is not None and slot + 1 == image}
    return named


def _text(text: str) -> str:
    return (read_text(text) or "").removesuffix(".").rstrip()


def _index(letter: str) -> int:
    return ord(letter) - ord("A")
