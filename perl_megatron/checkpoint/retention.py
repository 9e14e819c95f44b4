"""Which checkpoints of a run are kept: the newest N, and the best one by a metric.

Only what this run wrote, at this step or before, is ever deleted. What lies there of another run, and what is later
than the step that a run went on from (damaged, it was passed over), does not count and stays.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TEMPORARY = ".incomplete-"
"""What begins with this is no checkpoint, and is deleted by the next save."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Retention:
    """What a save keeps, and what the new checkpoint's manifest says of it."""

    keep: int = 2
    """How many of the newest."""
    run: str | None = None
    """The run that writes it; None: checkpoints of any run count as its own."""
    metric: str | None = None
    """The best checkpoint by this metric is kept too; None: there is none."""
    highest: bool = True
    """Whether a higher value is better."""
    value: float | None = None
    """The metric at the new checkpoint's step; None where it was not measured there."""

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        scored = self.metric is not None and self.value is not None and math.isfinite(self.value)
        return {
            **({} if self.run is None else {"run": self.run}),
            **({"score": {"metric": self.metric, "value": self.value}} if scored else {}),
        }

    def is_own(self, checkpoint: Path) -> bool:
        """Whether this run wrote it. Checkpoints from before runs had names of their own count as its own."""
        written_by = read_facts(checkpoint).get("run")
        return self.run is None or written_by is None or written_by == self.run

    def superfluous(self, newest: Path) -> list[Path]:
        """The checkpoints beside ``newest`` that are not kept."""
        own = [path for path in list_checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
        own = [path for path in own if self.is_own(path)]
        kept = {*own[-self.keep :], self.best(own)}
        return [path for path in own if path not in kept]

    def best(self, checkpoints: list[Path]) -> Path | None:
        """The one with the best value, of several the latest; None where none has one."""
        scored = []
        for path in checkpoints:
            score = read_facts(path).get("score")
            if isinstance(score, dict) and score.get("metric") == self.metric:
                value = float(score["value"])
                scored.append((value if self.highest else -value, step_of(path), path))
        return max(scored, default=(0.0, 0, None))[2]


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints below ``directory``, oldest first; damaged ones included."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says besides the files; nothing where it cannot be read (``verify_checkpoint`` says why)."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return {name: value for name, value in content.items() if name != "files"}
    except (OSError, ValueError, AttributeError):
        return {}


def delete_checkpoint(checkpoint: Path) -> None:
    """Take its name away first, so that half of one never counts."""
    doomed = checkpoint.with_name(f"{TEMPORARY}deleted-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
