"""The lettered options of a question: where they stand in its text, and which of them are images.

An option is an image if the contract gives its slot (``option_slots``): "(A) <image>", "(A) image 1", or a bare letter
that a prompt maps to an image. Its text stays and the answer's letter follows the image; the text of all other options
follows as the question does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from textwrap import shorten

from perl_megatron.data.contract.reference_phrases import NOUN, Reference, preceded_by
from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER, AnswerRule, Record

_MARKER = re.compile(r"\(([A-Z])\)|(?<![^\s,;])([A-Z])[).:=]")
_NOUN_BEFORE = re.compile(rf"\b{NOUN}s?\.?\s?$", re.IGNORECASE)
_NO_CONTENT = re.compile(r"\W*+(?:(?:and|or|vs|to|with)\b\W*+)?", re.IGNORECASE)
_BLANKS = re.compile(r"\s*+")
_MENTIONED = re.compile(
    r"\(([A-Z])\)|\b([B-HJ-Z])\b|\b(?i:both|and|or|nor|neither|options?|choices?)\s+(A)\b|\b(A)\s+(?:and|or|nor)\b"
)
_OPTION_MENTIONED = re.compile(r"\b(?i:options?|choices?|answers?)\s+(?:\(([A-Z])\)|([A-Z])\b)")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class LetteredOption:
    """Where an option stands in a text: ``text[marker:start]`` holds its letter, ``text[start:end]`` its own text."""

    marker: int
    start: int
    end: int

    def holds(self, reference: Reference) -> bool:
        """Whether a reference stands in the option's text."""
        return self.start <= reference.start < self.end


def letter(index: int) -> str:
    """'A' for 0."""
    return ALPHABET[index]


def lettered_options(text: str, count: int | None) -> list[LetteredOption]:
    """The options A, B, … that a text lists, at least ``count`` (None: two) of them; empty if it does not.

    Options are marked '(A)', 'A.', 'A)', 'A:' or 'A='. Letters that follow nouns ('image A: … image B: …'), or each
    other ('(A), (B) and (C)'), mark none. Of several lists the last is taken, but not one within another's last option.
    The last option ends with its line. An option's text has no blanks around it.
    """
    markers = list(_MARKER.finditer(text))
    letters = [marker[1] or marker[2] for marker in markers]
    following: list[int | None] = [None] * len(markers)
    nearest: dict[str, int] = {}
    for number in reversed(range(len(markers))):
        following[number] = nearest.get(chr(ord(letters[number]) + 1))
        nearest[letters[number]] = number
    found: list[LetteredOption] = []
    reader = _OptionReader(text)
    for first in (number for number, own in enumerate(letters) if own == "A"):
        if found and found[-1].marker < markers[first].start() < found[-1].end:
            continue
        options = list[LetteredOption]()
        current: int | None = first
        while current is not None and len(options) < (count or len(ALPHABET)):
            after = following[current]
            options.append(reader.option(markers[current], None if after is None else markers[after].start()))
            current = after
        if len(options) >= (count or 2) and reader.is_list(options):
            found = options
    return found


def option_spans(text: str, count: int | None) -> list[tuple[int, int]]:
    """Where the text of each listed option stands, (start, end); empty if the text lists none."""
    return [(option.start, option.end) for option in lettered_options(text, count)]


class _OptionReader:
    """Reads options of one text. Lists may share options, blanks and lines, which can be long: each is read once."""

    def __init__(self, text: str):
        self.text = text
        self._options: dict[int, LetteredOption] = {}
        self._trimmed: dict[int, int] = {}
        self._has_content: dict[LetteredOption, bool] = {}
        self._line = (0, -1)

    def option(self, marker: re.Match[str], end: int | None) -> LetteredOption:
        """The option behind a marker, up to ``end``; None: up to the end of the line of its first word."""
        if marker.start() not in self._options:
            start = self._first_word(marker.end())
            end = self._line_end(start) if end is None else end
            self._options[marker.start()] = LetteredOption(
                marker.start(), min(start, end), max(min(start, end), self._without_blanks(end))
            )
        return self._options[marker.start()]

    def is_list(self, options: list[LetteredOption]) -> bool:
        """Whether letters mark options, and not images ('image A: <image> image B: <image>') or mention options."""
        if all(preceded_by(self.text, option.marker, _NOUN_BEFORE) for option in options):
            return False
        return all(self._holds_words(option) for option in options[:-1])

    def _holds_words(self, option: LetteredOption) -> bool:
        if option not in self._has_content:
            self._has_content[option] = not _NO_CONTENT.fullmatch(self.text, option.start, option.end)
        return self._has_content[option]

    def _first_word(self, start: int) -> int:
        blanks = _BLANKS.match(self.text, start)
        assert blanks is not None
        return blanks.end()

    def _line_end(self, start: int) -> int:
        """The end of the line of ``start``."""
        if not self._line[0] <= start <= self._line[1]:
            end = self.text.find("\n", start)
            self._line = (start, len(self.text) if end < 0 else end)
        return self._line[1]

    def _without_blanks(self, end: int) -> int:
        """Where the last word before ``end`` ends."""
        if end not in self._trimmed:
            word_end = end
            while word_end and self.text[word_end - 1].isspace():
                word_end -= 1
            self._trimmed[end] = word_end
        return self._trimmed[end]


def slots_within(text: str, option: LetteredOption) -> list[int]:
    """The slots of the placeholders in an option."""
    first = text.count(IMAGE_PLACEHOLDER, 0, option.start)
    return list(range(first, first + text.count(IMAGE_PLACEHOLDER, option.start, option.end)))


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
    """Refuse options that show movable images, '(A) <image> (B) <image>', but that the contract does not say to be.

    An option that shows several of them would show others after a move, and its letter says nothing of it.
    """
    contract = record.contract
    if not contract.permutable:
        return
    listed = lettered_options(record.text, len(contract.option_slots) or None) or lettered_options(record.text, None)
    for index, option in enumerate(listed):
        shown = slots_within(record.text, option)
        moving = [slot for slot in shown if slot in contract.movable]
        expected = contract.option_slots[index] if index < len(contract.option_slots) else None
        if not moving or shown == [expected] or (len(shown) == 1 and _follows(record, index, shown[0])):
            continue
        several = len(shown) > 1
        raise UserError(
            f"option {letter(index)} shows the image{'s' if several else ''} of slot{'s' if several else ''} "
            f"{', '.join(map(str, shown))}, which move{'' if several else 's'}, but the contract "
            + ("says nothing of it" if expected is None else f"gives slot {expected}"),
            fix="let no image move" if several else "use the answer rule 'option_letter' with the slot of each option",
        )


def _follows(record: Record, index: int, slot: int) -> bool:
    """Whether an answer that names an option names its image: by the image's number, or by a letter that is its own."""
    rule = record.contract.answer
    return rule in (AnswerRule.INDEX, AnswerRule.ORDERING) or (rule is AnswerRule.REFERENCES and index == slot)


def check_named_slots(record: Record, options: list[LetteredOption], references: list[Reference]) -> None:
    """Refuse an option whose text names another image than the contract does."""
    for slot, option in zip(record.contract.option_slots, options, strict=False):
        named = [reference.slots for reference in references if option.holds(reference)]
        if slot is not None and any(slots != (slot,) for slots in named):
            raise UserError(
                f"option '{record.text[option.start : option.end]}' names another image than its slot {slot}",
                fix="option_slots are counted from 0, image numbers in the text from 1",
            )


def check_mentioned_letters(record: Record, options: list[LetteredOption]) -> None:
    """Refuse a mention of some of the options whose images move, as in '(D) both A and B': it would not follow them.

    A mention of all of them, '(C) both A and B' beside two images, is true in every order.
    """
    contract = record.contract
    moving = {letter(index) for index, slot in enumerate(contract.option_slots) if slot in contract.movable}
    if len(moving) < 2 or not contract.permutable:
        return
    stays = [option for option, slot in zip(options, contract.option_slots, strict=False) if slot is None]
    texts = [(record.text[option.start : option.end], _MENTIONED) for option in stays]
    texts.append((record.text[: options[0].marker] if options else record.text, _OPTION_MENTIONED))
    for text, pattern in texts:
        mentioned = {group for match in pattern.finditer(text) for group in match.groups() if group} & moving
        if mentioned and mentioned != moving:
            raise UserError(
                f"'{shorten(text, 60)}' mentions option {', '.join(sorted(mentioned))}, whose image moves",
                fix="mention all of the options that are images or none, or let no image move",
            )
