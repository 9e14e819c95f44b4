"""What a person sees while a run goes: a live bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHOWN = (
    ("loss", "loss {:.4f}"),
    ("reward/mean", "reward {:.3f}"),
    ("reward/accuracy", "accuracy {:.3f}"),
    ("evaluation/accuracy", "accuracy {:.3f}"),
    ("kl", "kl {:.4f}"),
    ("throughput/tokens_per_second", "{:.0f} tokens/s"),
)
"""Metrics in the line of a step, where they are logged."""
QUIET_SECONDS = 10
"""Where there is no bar, phases are announced when the last step ended so long ago."""
ETA_WINDOW = 10
"""The time left is estimated from so many last steps."""


class RunProgress:
    """Progress of a run over its steps (rank 0).

    Args:
        name: shown in front.
        total_steps: steps of the whole run.
        first_step: steps already done before this start.
        unit: what a step is called in plain lines.
        stream: where to; standard error by default. A bar where it is a terminal, else plain lines.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        *,
        first_step: int = 0,
        unit: str = "step",
        stream: TextIO | None = None,
    ):
        stream = stream if stream is not None else sys.stderr
        self._name, self._total, self._unit, self._stream = name, total_steps, unit, stream
        self._marks: deque[tuple[int, float]] = deque([(first_step, time.monotonic())], maxlen=ETA_WINDOW + 1)
        self._bar: Progress | None = None
        if stream.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[phase]}"),
                TextColumn("[dim]{task.fields[line]}"),
                TimeElapsedColumn(),
                TextColumn("left {task.fields[left]}"),
                console=Console(file=stream),
            )
            self._task = self._bar.add_task(
                name, total=total_steps, completed=first_step, phase="", line="", left="-:--:--"
            )
            self._bar.start()

    def phase(self, name: str) -> None:
        """Show the phase that begins (without a terminal only after a while of silence)."""
        if self._bar is not None:
            self._bar.update(self._task, phase=name)
        elif time.monotonic() - self._marks[-1][1] > QUIET_SECONDS:
            self.note(f"{name} ...")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done, with the chosen of its metrics."""
        now = time.monotonic()
        self._marks.append((step, now))
        line, left = step_line(metrics), self._time_left(step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line, left=left)
        else:
            self.note(f"{self._unit} {step}/{self._total}  {line}  left {left}")

    def note(self, text: str) -> None:
        """Print a line (an evaluation, a checkpoint) without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(f"[{self._name}] {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        (first_step, first_time), (_, last_time) = self._marks[0], self._marks[-1]
        if step <= first_step:
            return "-:--:--"
        seconds = round((last_time - first_time) / (step - first_step) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def step_line(metrics: Mapping[str, float]) -> str:
    """The metrics of a step on one line."""
    parts = [text.format(metrics[name]) for name, text in SHOWN if name in metrics]
    if "groups/kept" in metrics:
        kept, dropped = metrics["groups/kept"], metrics.get("groups/dropped", 0)
        parts.append(f"groups {kept:.0f} kept, {dropped:.0f} dropped")
    if "seconds/step" in metrics:
        parts.append(f"{metrics['seconds/step']:.1f} s")
    return "  ".join(parts)
