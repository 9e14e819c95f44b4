"""Rows of Mantis-Instruct as candidates for questions.

A row has ``images`` (bytes, or paths), and ``conversation`` (or ``conversations``), a list of turns with ``role`` and
``content`` (or ``from`` and ``value``), in whose texts ``<image>`` stands once for each image.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl_megatron.data.tables import Row, rows, table_files
from perl_megatron.preparation.settings import SourceSettings
from perl_megatron.types import IMAGE_PLACEHOLDER

_USERS = ("user", "human")
_ASSISTANTS = ("assistant", "gpt")


@dataclass(frozen=True)
class Candidate:
    """A question and its answer, as the table has them."""

    id: str
    source: str
    """The table (relative to the source) and row."""
    table: Path
    images: tuple[Any, ...]
    """As the table gives them: see ``TableImages.read``."""
    text: str
    answer: str


@dataclass(frozen=True)
class BrokenRow:
    """A row that is no conversation over images."""

    id: str
    source: str
    reason: str


def read_candidates(settings: SourceSettings) -> Iterator[Candidate | BrokenRow]:
    """Everything in the source, in the order of its tables. UserError for tables that are corrupt as a whole."""
    base = settings.path if settings.path.is_dir() else settings.path.parent
    for table in source_tables(settings):
        broken: list[BrokenRow] = []

        def on_broken(where: str, reason: str, broken: list[BrokenRow] = broken) -> None:
            place = _relative(where, base)
            broken.append(BrokenRow(place, place, f"the row cannot be read: {reason}"))

        for row in rows(table, on_broken=on_broken):
            yield from broken
            broken.clear()
            yield from _of_row(row, table, _relative(row.where, base), all_turns=settings.turns == "all")
        yield from broken


def source_tables(settings: SourceSettings) -> list[Path]:
    """The tables that are read."""
    tables = table_files(settings.path)
    return [table for table in tables if not any(fnmatch.fnmatch(str(table), name) for name in settings.exclude)]


def _relative(where: str, base: Path) -> str:
    return where.removeprefix(f"{base}/")


def _of_row(row: Row, table: Path, source: str, *, all_turns: bool) -> Iterator[Candidate | BrokenRow]:
    identifier = str(row.values.get("id") or source)
    turns = row.values.get("conversation") or row.values.get("conversations")
    images = row.values.get("images")
    if images is None:
        images = row.values.get("image")
    images = images if isinstance(images, list) else [] if images is None else [images]
    try:
        pairs = _pairs(turns)
    except ValueError as error:
        yield BrokenRow(identifier, source, str(error))
        return
    num_shown = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in pairs)
    if num_shown != len(images):
        yield BrokenRow(identifier, source, "the number of placeholders is not the number of images")
        return
    earlier = 0
    for number, (question, answer) in enumerate(pairs if all_turns else pairs[:1]):
        shown = question.count(IMAGE_PLACEHOLDER)
        # Images of earlier turns are shown in front: the question may be about them.
        text = IMAGE_PLACEHOLDER * earlier + ("\n" if earlier and shown == 0 else "") + question
        earlier += shown
        name = identifier if number == 0 else f"{identifier}/turn{number + 1}"
        yield Candidate(name, source, table, tuple(images[:earlier]), text, answer)


def _pairs(turns: Any) -> list[tuple[str, str]]:
    """(question, answer) of each exchange. ValueError for what is no conversation."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("the row has no conversation")
    pairs: list[tuple[str, str]] = []
    question: str | None = None
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn of the conversation is no object")
        role = turn.get("role", turn.get("from"))
        text = turn.get("content", turn.get("value"))
        if not isinstance(text, str):
            raise ValueError("a turn of the conversation has no text")
        if role in _USERS:
            if question is not None:
                raise ValueError("a question of the conversation has no answer")
            question = text.strip()
        elif role in _ASSISTANTS:
            if question is None:
                raise ValueError("an answer of the conversation has no question")
            if IMAGE_PLACEHOLDER in text:
                raise ValueError("an answer of the conversation shows an image")
            pairs.append((question, text.strip()))
            question = None
    if not pairs:
        raise ValueError("the conversation has no answered question")
    return pairs
