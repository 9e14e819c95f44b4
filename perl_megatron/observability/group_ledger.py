"""`groups.jsonl`: what became of every group that was drawn, step by step. Written by rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perl_megatron.observability.append_file import AppendFile
from perl_megatron.observability.full_disk import FullDisk
from perl_megatron.observability.json_lines import read_rows, to_line, write_rows


class GroupLedger:
    """Appends the rows of a step at once.

    Args:
        path: the `groups.jsonl`.
        resumed_step: the step that the run continues from (0: a new run). Rows of later steps are removed: these steps
            will be done again.
        disk: is told where the disk is full; None: one of its own.
    """

    def __init__(self, path: Path, *, resumed_step: int = 0, disk: FullDisk | None = None):
        rows = [row for row in read_rows(path) if row["step"] <= resumed_step]
        self._steps = {row["step"] for row in rows}
        write_rows(path, rows)
        self._file = AppendFile(path, disk or FullDisk(), what=f"rows of {path.name}")

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of one step; a step is written once."""
        assert step not in self._steps, f"the groups of step {step} are in the ledger already"
        self._steps.add(step)
        self._file.append("".join(to_line(dict(row)) for row in rows).encode(), count=len(rows))

    def sync(self) -> None:
        """Wait for the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
