"""Which checkpoints of a run are kept: the newest N, and the best one by a metric.

Only what this run wrote, at this step or before, is ever deleted. What lies there of another run, and what is later
than the step that a run went on from (damaged, it was passed over), does not count and stays.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TEMPORARY = ".incomplete-"
"""What begins with this is no checkpoint, and is deleted by the next save."""
_NAME = re.compile(r"step-(\d{8,})")

logger = logging.getLogger(__name__)


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
        """Whether this run wrote it, as far as is known: nobody's is one whose manifest cannot be read.

        Checkpoints from before runs had names of their own count as its own.
        """
        facts = read_facts(checkpoint)
        return self.run is None or (bool(facts) and facts.get("run") in (None, self.run))

    def superfluous(self, newest: Path) -> list[Path]:
        """The checkpoints beside ``newest`` that are not kept."""
        own = self._own(newest)
        kept = {*own[-self.keep :], self.best(own)}
        return [path for path in own if path not in kept]

    def delete_superfluous(self, newest: Path) -> None:
        """Delete them; one that cannot be deleted is named in a warning, as the others are complete all the same."""
        for old in self.superfluous(newest):
            try:
                delete_checkpoint(old)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", old, error)

    def score_late(self, newest: Path, value_of: Callable[[int], float | None]) -> None:
        """Give each checkpoint up to ``newest`` the value of its step, then delete those that are not kept any more.

        For values that were measured after the checkpoint was written: an evaluation that was made up for, or that of
        the final policy. ``value_of`` says None where a step has no value; what the manifest says of it then stays.
        OSError where a manifest cannot be written; it is then as it was.
        """
        if self.metric is None or not newest.is_dir():
            return
        for path in self._own(newest):
            late = replace(self, value=value_of(step_of(path))).facts().get("score")
            if late is not None and read_facts(path).get("score") != late:
                _add_facts(path, {"score": late})
        self.delete_superfluous(newest)

    def _own(self, newest: Path) -> list[Path]:
        """This run's checkpoints up to this one, oldest first."""
        own = [path for path in list_checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
        return [path for path in own if self.is_own(path)]

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


def _add_facts(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Say more in the manifest, which is the old one or the new one at any moment; nothing where it is damaged."""
    manifest = checkpoint / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = content.pop("files")
    except (ValueError, KeyError, AttributeError, FileNotFoundError):
        return
    temporary = manifest.with_name(f"{MANIFEST}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({**content, **facts, "files": files}, indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, manifest)
    finally:
        temporary.unlink(missing_ok=True)


def delete_checkpoint(checkpoint: Path) -> None:
    """Take its name away first, so that half of one never counts."""
    doomed = checkpoint.with_name(f"{TEMPORARY}deleted-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
