"""`metrics.jsonl` and TensorBoard events of a run, written by rank 0."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perl_megatron.observability.append_file import AppendFile
from perl_megatron.observability.event_file import EventFile
from perl_megatron.observability.full_disk import FullDisk
from perl_megatron.observability.json_lines import read_rows, to_line, write_rows
from perl_megatron.observability.metrics import check_names


class MetricsLog:
    """Appends rows `{"step", "time", name: value, …}`.

    Args:
        metrics_file: the `metrics.jsonl`.
        tensorboard: folder of the event files.
        resumed_step: the step that the run continues from (0: a new run). Rows and events of later steps are removed,
            so that a step is never logged twice.
        disk: is told where the disk is full; None: one of its own. Rows that wait for space
            are known all the same.
    """

    def __init__(self, metrics_file: Path, tensorboard: Path, *, resumed_step: int = 0, disk: FullDisk | None = None):
        self.path, disk = metrics_file, disk or FullDisk()
        self._rows = [row for row in read_rows(metrics_file) if row["step"] <= resumed_step]
        write_rows(metrics_file, self._rows)
        self._file = AppendFile(metrics_file, disk, what=f"rows of {metrics_file.name}")
        is_resumed = tensorboard.is_dir() and any(tensorboard.iterdir())
        self._events = EventFile(tensorboard, disk, purge_step=resumed_step + 1 if is_resumed else None)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the run so far, those before a resume included."""
        return list(self._rows)

    def has(self, step: int, name: str) -> bool:
        """Whether the metric is already logged at this step (an evaluation of a resumed step, say)."""
        return any(row["step"] == step and name in row for row in self._rows)

    def value(self, step: int, name: str) -> float | None:
        """The metric at this step, the one logged last; None where it is not logged, or not finite."""
        found = [row[name] for row in self._rows if row["step"] == step and name in row]
        return found[-1] if found and found[-1] is not None and math.isfinite(found[-1]) else None

    def sync(self) -> None:
        """Wait for the disk."""
        self._file.sync()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row now; every name has to be in the catalogue (assert)."""
        check_names(metrics)
        row = {"step": step, "time": round(time.time(), 3), **{name: float(value) for name, value in metrics.items()}}
        self._rows.append(row)
        self._file.append(to_line(row).encode())
        self._events.log(step, metrics)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._events.close()
