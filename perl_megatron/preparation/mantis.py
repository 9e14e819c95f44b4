"""Rows of Mantis-Instruct as candidates for questions; the import's reader reads them (``read_mantis``)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perl_megatron.data.row_formats import read_mantis
from perl_megatron.data.row_import import readable_id
from perl_megatron.data.tables import Row, rows, table_files
from perl_megatron.errors import UserError
from perl_megatron.preparation.settings import SourceSettings


@dataclass(frozen=True)
class Candidate:
    """A question and its answer, as the table has them."""

    id: str
    source: str
    """The table (relative to the source) and row."""
    table: Path
    images: tuple[bytes | str, ...]
    """For each image the bytes of its file, or the path to it."""
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
    try:
        drafts = read_mantis(row.values)
    except UserError as error:
        yield BrokenRow(readable_id(row.values) or source, source, error.what)
        return
    identifier = drafts[0].id or source
    for number, draft in enumerate(drafts if all_turns else drafts[:1], start=1):
        # Not '#2', as in an import: that is the second row with this id.
        name = identifier if number == 1 else f"{identifier}/turn{number}"
        yield Candidate(name, source, table, draft.images, draft.text.strip(), draft.answer.strip())
