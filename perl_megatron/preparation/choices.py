"""Multiple choice as it stands in a text: "… (A) red (B) blue" with the answer "(B)", and the same taken apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from perl_megatron.data.answer_guess import option_named_by
from perl_megatron.data.contract.options import letter, lettered_options
from perl_megatron.types import IMAGE_PLACEHOLDER

_INSTRUCTION = re.compile(r"\s*(?:please\s+)?(?:answer|choose|select|pick|respond|reply|give|write)\b.*", re.I | re.S)
_HEADING = re.compile(r"(?:the\s+)?(?:options|choices|answer choices|candidates)(?:\s+are)?\s*:$", re.IGNORECASE)
_HEADING_CHARACTERS = 64
"""A heading is looked for in so many characters before the options: blanks in a long text would be gone over often."""


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question, taken apart."""

    stem: str
    """The text without options and without an instruction how to answer them."""
    options: tuple[str, ...]
    letter: str | None
    """Of the right option; None where the answer names none of them, or gives a letter and another option's text."""


def split_choice(text: str, answer: str) -> Choice | None:
    """The parts of a multiple-choice question; None for a text that lists no options by letter.

    What follows the last option's line stays with the question, unless it only says how to answer.
    """
    listed = lettered_options(text, None)
    if not listed:
        return None
    options = [_clean(text[option.start : option.end]) for option in listed]
    worded = [option.casefold() for option in options if IMAGE_PLACEHOLDER not in option]
    if not all(options) or len(set(worded)) < len(worded):
        return None
    rest = text[listed[-1].end :]
    stem = _without_heading(text[: listed[0].marker].rstrip())
    if IMAGE_PLACEHOLDER in rest and len(worded) < len(options):
        return None  # the images would change their order
    if IMAGE_PLACEHOLDER in rest or not _INSTRUCTION.fullmatch(rest):
        stem += rest.rstrip()
    if not reads_back(stem, options):
        return None
    return Choice(stem, tuple(options), option_named_by(answer, options))


def with_options(stem: str, options: Sequence[str]) -> str:
    """The question as it is asked, its options each on a line."""
    return "\n".join([stem, *(f"({letter(index)}) {option}" for index, option in enumerate(options))])


def reads_back(stem: str, options: Sequence[str]) -> bool:
    """Whether who reads the question's text finds these options in it, each on its line, and no others: an option
    "size (C) of the cup" can be taken for two."""
    text = with_options(stem, options)
    found = [text[option.start : option.end] for option in lettered_options(text, None)]
    return found == list(options) and not any("\n" in option for option in options)


def _without_heading(stem: str) -> str:
    heading = _HEADING.search(stem, max(0, len(stem) - _HEADING_CHARACTERS))
    return stem if heading is None else stem[: heading.start()].rstrip()


def _clean(option: str) -> str:
    return option.strip().rstrip(",;").strip()
