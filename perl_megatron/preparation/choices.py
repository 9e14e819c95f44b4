"""Multiple choice as it stands in a text: "… (A) red (B) blue" with the answer "(B)", and the same taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from perl_megatron.preparation.question import letter_of
from perl_megatron.types import IMAGE_PLACEHOLDER

_MARKER = re.compile(r"\(([A-Z])\)|(?<![^\s,;])([A-Z])[).:](?=\s|<)")
_INSTRUCTION = re.compile(r"\s*(?:please\s+)?(?:answer|choose|select|pick|respond|reply|give|write)\b.*", re.I | re.S)
_HEADING = re.compile(r"\s*(?:the\s+)?(?:options|choices|answer choices|candidates)(?:\s+are)?\s*:\s*$", re.IGNORECASE)
_LETTER_ANSWER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|option|choice)\s*(?:is|:)?\s*)*"
    r"(?:\(([A-Z])\)|([A-Z])[.):]|([A-Z])\s*$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question, taken apart."""

    stem: str
    """The text without options and without an instruction how to answer them."""
    options: tuple[str, ...]
    letter: str | None
    """Of the right option; None where the answer names none of them."""


def split_choice(text: str, answer: str) -> Choice | None:
    """The parts of a multiple-choice question; None for a text that lists no options by letter.

    Options are marked '(A)', 'A.', 'A)' or 'A:', at least A and B, and the last such list of the text counts. The last
    option ends with its line; what follows stays with the question, unless it only says how to answer.
    """
    markers = _last_list(list(_MARKER.finditer(text)))
    if len(markers) < 2:
        return None
    last_line_end = text.find("\n", markers[-1].end())
    end = len(text) if last_line_end < 0 else last_line_end
    ends = [marker.start() for marker in markers[1:]] + [end]
    options = [_clean(text[marker.end() : stop]) for marker, stop in zip(markers, ends, strict=True)]
    worded = [option.casefold() for option in options if IMAGE_PLACEHOLDER not in option]
    if not all(options) or len(set(worded)) < len(worded):
        return None
    rest = text[end:]
    stem = _HEADING.sub("", text[: markers[0].start()]).rstrip()
    if IMAGE_PLACEHOLDER in rest and len(worded) < len(options):
        return None  # the images would change their order
    if IMAGE_PLACEHOLDER in rest or not _INSTRUCTION.fullmatch(rest):
        stem += rest.rstrip()
    return Choice(stem, tuple(options), _letter(answer, options))


def _last_list(markers: list[re.Match[str]]) -> list[re.Match[str]]:
    """The last run of markers A, B, C, …, one right after the other."""
    starts = [number for number, marker in enumerate(markers) if _of(marker) == "A"]
    for start in reversed(starts):
        run: list[re.Match[str]] = []
        for marker in markers[start:]:
            if _of(marker) != letter_of(len(run)):
                break
            run.append(marker)
        if len(run) >= 2:
            return run
    return []


def _of(marker: re.Match[str]) -> str:
    return str(marker[1] or marker[2])


def _clean(option: str) -> str:
    return option.strip().rstrip(",;").strip()


def _letter(answer: str, options: list[str]) -> str | None:
    match = _LETTER_ANSWER.match(answer.strip())
    if match is not None:
        letter = (match[1] or match[2] or match[3]).upper()
        return letter if ord(letter) - ord("A") < len(options) else None
    spoken = answer.strip().rstrip(".").casefold()
    same = [index for index, option in enumerate(options) if option.rstrip(".").casefold() == spoken]
    return letter_of(same[0]) if same else None
