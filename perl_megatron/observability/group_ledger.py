"""`groups.jsonl`: what became of every group that was drawn, step by step. Written by rank 0."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perl_megatron.observability.json_lines import read_rows, to_line, write_rows


class GroupLedger:
    """Appends the rows of a step at once.

    Args:
        path: the `groups.jsonl`.
        resumed_step: the step that the run continues from (0: a new run). Rows of later steps are removed: these steps
            will be done again.
    """

    def __init__(self, path: Path, *, resumed_step: int = 0):
        self._steps: set[int] = set()
        if path.exists():
            rows = [row for row in read_rows(path) if row["step"] <= resumed_step]
            self._steps = {row["step"] for row in rows}
            write_rows(path, rows)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of one step; a step is written once."""
        assert step not in self._steps, f"the groups of step {step} are in the ledger already"
        self._steps.add(step)
        self._file.write("".join(to_line(dict(row)) for row in rows))
        self._file.flush()

    def sync(self) -> None:
        """Wait for the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
