"""The files of one stage, which may be interrupted at any time:

    03_difficulty.jsonl          the questions that it keeps, in the order of its input once it is finished
    03_difficulty.dropped.jsonl  the questions that it drops, each with the reason
    03_difficulty.raw.jsonl      raw outputs (replies, responses), where the stage has any

A question is decided once its line in one of the first two is whole; a torn line is cut off at the next start.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from perl_megatron.errors import UserError
from perl_megatron.preparation.question import Kept, Outcome, Question, Unanswered, from_values, to_values

KEPT, DROPPED, RAW = "", ".dropped", ".raw"
NUM_LISTED = 3
"""Reasons why questions were not answered that an error message lists."""


@dataclass
class StageCounts:
    """What became of a stage's questions, in all runs so far."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    unanswered: Counter[str] = field(default_factory=Counter)
    """By reason, in the last run."""
    num_repeats: int = 0
    """Kept questions that stand for one which is kept already."""

    @property
    def num_in(self) -> int:
        """Questions that came in."""
        return self.kept - self.num_repeats + self.dropped.total() + self.unanswered.total()

    def values(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "in": self.num_in,
            "out": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "unanswered": dict(self.unanswered.most_common()),
        }


class StageFiles:
    """The files of stage ``number`` in ``folder``; a context manager while they are written to."""

    def __init__(self, folder: Path, number: int, name: str):
        self.name = name
        self._paths = {suffix: folder / f"{number:02d}_{name}{suffix}.jsonl" for suffix in (KEPT, DROPPED, RAW)}
        self._open: dict[str, FileIO] = {}

    @property
    def paths(self) -> list[Path]:
        """All files that the stage may have."""
        return list(self._paths.values())

    def questions(self) -> Iterator[Question]:
        """The kept questions."""
        for number, row in enumerate(_rows(self._paths[KEPT]), start=1):
            yield from_values(row, where=f"{self._paths[KEPT]}:{number}")

    def raw_outputs(self) -> Iterator[dict[str, Any]]:
        """The raw outputs."""
        yield from _rows(self._paths[RAW])

    def decided(self) -> tuple[set[str], StageCounts]:
        """The ids of all questions that are decided, and their counts."""
        counts, done = StageCounts(), set()
        for suffix in (KEPT, DROPPED):
            for row in _rows(self._paths[suffix]):
                done.add(row["id"])
                if suffix == KEPT:
                    counts.kept += 1
                else:
                    counts.dropped[row["reason"]] += 1
        return done, counts

    def mend(self) -> None:
        """Take away what an interruption tore: half lines, and a raw output whose question is not decided (it comes
        again)."""
        for path in self.paths:
            _cut_torn_line(path)
        done, _ = self.decided()
        _keep_lines(self._paths[RAW], [row["id"] in done for row in _rows(self._paths[RAW])])

    def write(self, outcomes: Iterable[Outcome], counts: StageCounts) -> None:
        """Write what is decided as it comes, and count it."""
        try:
            for outcome in outcomes:
                self._write(outcome, counts)
        finally:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def finish(self, order: Sequence[str] | None = None) -> None:
        """Bring the files into the ``order`` of the input (None: they are in it): questions that were not answered at
        first stand at the end until now."""
        self._paths[KEPT].touch()  # a stage that keeps nothing is finished too
        if order is None:
            return
        rank = {identifier: place for place, identifier in enumerate(order)}
        for path in self.paths:
            _sort_lines(path, [rank[row["id"]] for row in _rows(path)])

    def _write(self, outcome: Outcome, counts: StageCounts) -> None:
        if isinstance(outcome, Unanswered):
            counts.unanswered[outcome.reason] += 1
            return
        identifier = outcome.question.id if isinstance(outcome, Kept) else outcome.id
        if outcome.raw is not None:
            self._append(RAW, {"id": identifier, **outcome.raw})
        if isinstance(outcome, Kept):
            self._append(KEPT, to_values(outcome.question))
            counts.kept += 1
        else:
            values = {"id": outcome.id, "source": outcome.source, "reason": outcome.reason, "detail": outcome.detail}
            self._append(DROPPED, values)
            counts.dropped[outcome.reason] += 1

    def _append(self, suffix: str, row: dict[str, Any]) -> None:
        try:
            if suffix not in self._open:
                self._open[suffix] = self._paths[suffix].open("ab", buffering=0)
            self._open[suffix].write(_line(row))
        except OSError as error:
            raise UserError(
                f"the stage '{self.name}' cannot be written: {error.strerror}",
                where=str(self._paths[suffix]),
                fix="free some space and start again: what is finished stays",
            ) from error


def refuse_unanswered(name: str, counts: StageCounts) -> None:
    """UserError where questions of a stage were not answered: the next one would miss them."""
    num = counts.unanswered.total()
    if num:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in counts.unanswered.most_common(NUM_LISTED))
        raise UserError(
            f"{num} of {counts.num_in} questions were not answered: {reasons}",
            where=f"stage '{name}'",
            fix="start again once the endpoint is well: only these are asked",
        )


def _line(row: dict[str, Any]) -> bytes:
    # ASCII only: whatever a model writes, lone surrogates and line separators too, is one line and is read back.
    return json.dumps(row).encode("ascii") + b"\n"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                yield json.loads(line)


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)


def _keep_lines(path: Path, keep: Sequence[bool]) -> None:
    if not all(keep):
        with path.open("rb") as lines:
            _replace(path, (line for line, kept in zip(lines, keep, strict=True) if kept))


def _sort_lines(path: Path, ranks: Sequence[int]) -> None:
    if all(first <= second for first, second in itertools.pairwise(ranks)):
        return
    with path.open("rb") as source:
        lengths = [len(line) for line in source]
        starts = [0, *itertools.accumulate(lengths)]

        def line(number: int) -> bytes:  # raw outputs can be larger than the memory
            source.seek(starts[number])
            return source.read(lengths[number])

        _replace(path, map(line, sorted(range(len(ranks)), key=ranks.__getitem__)))


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
    os.replace(temporary, path)
