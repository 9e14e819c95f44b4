"""What actor_worker.py's ranks found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from actor_case import gradient
from actor_worker import TABLES
from launch_ranks import launch_ranks

WORKER = Path(__file__).with_name("actor_worker.py")


@dataclass(frozen=True)
class Found:
    """Of one layout."""

    arrays: Mapping[str, np.ndarray]
    report: Mapping[str, Any]

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """float64: the gradient that the step took, times the part's multiplier."""
        before, after = ({name: self.arrays[f"{when}/{name}"] for name in self._names} for when in ("before", "after"))
        return gradient(before, after)

    @property
    def _names(self) -> list[str]:
        return [name.removeprefix("before/") for name in self.arrays if name.startswith("before/")]


def run_worker(cases: Path, out: Path, table: str) -> dict[str, Found]:
    """Two ranks through every layout of the table."""
    launch_ranks(WORKER, cases, out, table, log=out / "ranks.log")
    return {
        name: Found(dict(np.load(out / f"{name}.npz")), json.loads((out / f"{name}.json").read_text()))
        for name in TABLES[table]
    }


def pace_of(sections: Mapping[str, Any], tensor: str) -> float:
    """The multiplier of the learning rate of a published tensor, in a layout of these sections."""
    part = "merger" if ".merger." in tensor else "vision" if tensor.startswith("visual.") else "language"
    return sections.get("optimizer", {}).get(f"{part}_multiplier", 1.0)
