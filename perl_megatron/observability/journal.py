"""All that a run leaves for a person to read. Every rank calls every method; only rank 0 writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from perl_megatron.observability.full_disk import FullDisk
from perl_megatron.observability.group_ledger import GroupLedger
from perl_megatron.observability.memory import PeakMemory
from perl_megatron.observability.metrics_log import MetricsLog
from perl_megatron.observability.progress import RunProgress
from perl_megatron.observability.recorder import RolloutRecorder
from perl_megatron.observability.report import write_report
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.observability.summary import summarize, write_summary
from perl_megatron.types import Group

logger = logging.getLogger(__name__)

SHOWN = "lines of what the run shows"


class Journal:
    """Metrics, rollout records, progress, summary and report of one run.

    Where the disk is full, the run goes on without them: a person is told once, and in the end what is missing.

    Args:
        folder: the run's folder, already created.
        total_steps: steps of the whole run.
        first_step: the step that the run continues from (0: a new run); later entries are removed.
        writes: whether this rank writes (rank 0).
        image_of: gives an image by content hash, for the rollout records; None: rollouts are not recorded.
        seconds_before: wall time that the run had used before this start.
        memory: samples the memory of all processes (rank 0's; others have None). The run's wall time counts from when
            it was made, and it is closed with the journal.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        total_steps: int,
        first_step: int,
        writes: bool,
        image_of: Callable[[str], Image] | None,
        seconds_before: float,
        memory: PeakMemory | None,
    ):
        self.folder = folder
        self._progress: RunProgress | None = None
        self._start = (time.monotonic() if memory is None else memory.start) - seconds_before
        self._log: MetricsLog | None = None
        if not writes or memory is None:
            return
        self._disk = FullDisk(self._tell)
        self._ledger = GroupLedger(folder.groups, resumed_step=first_step, disk=self._disk)
        self._recorder = None
        if image_of is not None:
            self._recorder = RolloutRecorder(folder.rollouts, image_of=image_of, resumed_step=first_step)
        self._memory = memory
        self._log = MetricsLog(folder.metrics, folder.tensorboard, resumed_step=first_step, disk=self._disk)
        self._progress = RunProgress(folder.root.name, total_steps, first_step=first_step)

    def has(self, step: int, name: str) -> bool:
        """Whether this rank has logged the metric at this step, in an earlier start of the run too."""
        return self._log is not None and self._log.has(step, name)

    def value(self, step: int, name: str) -> float | None:
        """What this rank has logged at this step, if it has."""
        return None if self._log is None else self._log.value(step, name)

    def sync(self) -> None:
        """Wait until the rows that a resumed run keeps are on the disk: a checkpoint is worth nothing without them."""
        if self._log is not None:
            self._log.sync()
            self._ledger.sync()

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, earlier starts included."""
        return time.monotonic() - self._start

    def phase(self, name: str) -> None:
        """Show which phase begins."""
        if self._progress is not None:
            with self._disk.tolerated(SHOWN):
                self._progress.phase(name)

    def note(self, text: str) -> None:
        """Tell the person something once."""
        if self._progress is not None:
            with self._disk.tolerated(SHOWN):
                self._progress.note(text)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step's metrics, with the peak memory so far."""
        if self._log is not None and self._progress is not None:
            self._log.log(step, {**metrics, "memory/peak_rss_gib": self._memory.gib})
            with self._disk.tolerated(SHOWN):
                self._progress.step(step, metrics)

    def rollouts(self, step: int, kept: Sequence[Group], dropped: Sequence[Group]) -> None:
        """Record all rollouts of a step."""
        if self._log is not None and self._recorder is not None:
            with self._disk.tolerated("recorded steps"):
                self._recorder.record(step, kept=kept, dropped=dropped)

    def groups(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write what became of every group of a step to the ledger."""
        if self._log is not None:
            self._ledger.write(step, rows)

    def evaluation(self, step: int, metrics: Mapping[str, float], write_outputs: Callable[[Path], None]) -> None:
        """Log one evaluation and keep its raw outputs."""
        if self._log is not None:
            with self._disk.tolerated("answers of evaluations"):
                write_outputs(self.folder.evaluation_outputs(step))  # first: what is logged is not evaluated again
            self._log.log(step, metrics)
            accuracy, flip_rate = metrics["evaluation/accuracy"], metrics["evaluation/flip_rate"]
            self.note(f"held-out after step {step}: accuracy {accuracy:.1%}, flip rate {flip_rate:.1%}")

    def summarize(self, *, engine: str, layout: str) -> dict[str, Any]:
        """Write and return the summary; empty on ranks that do not write."""
        if self._log is None:
            return {}
        summary = summarize(
            self._log.rows, engine=engine, layout=layout, seconds_total=self.seconds, peak_rss_gib=self._memory.gib
        )
        with self._disk.tolerated("summary, which --resume writes"):
            write_summary(self.folder.summary, summary)
        return summary

    def report(self) -> None:
        """Write the plot and the HTML report."""
        if self._log is not None:
            with self._disk.tolerated("report, which --resume writes"):
                write_report(self.folder)

    def close(self) -> None:
        """Flush and close all files."""
        if self._log is not None and self._progress is not None:
            self._memory.close()
            self._ledger.close()
            self._log.close()
            self._disk.tell_missing()
            self._progress.close()

    def _tell(self, text: str) -> None:
        """What the disk has to say, maybe before there is a progress."""
        if self._progress is None:
            logger.warning(text)
        else:
            self._progress.note(text)
