"""Ours against a peer: fresh processes in turn, medians, rows and the table that every benchmark prints.

A benchmark script runs itself again as a worker (``--worker NAME``); a worker's last line of output is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Row:
    """One comparison. A ratio below 1 is better for us."""

    case: str
    ours: float
    peer: str
    """Name of the peer."""
    peer_value: float
    unit: str
    ratio: float
    """ours / peer_value."""
    goal: float | None
    """The bound on ``ratio``; None where the issue sets none."""
    spread: tuple[float, float]
    """(largest - smallest) / median of ours and of the peer."""

    @property
    def holds(self) -> bool | None:
        """Whether the ratio meets its goal; None without one."""
        return None if self.goal is None else self.ratio <= self.goal


def make_row(
    case: str, ours: Sequence[float], peer: str, theirs: Sequence[float], unit: str, goal: float | None
) -> Row:
    """The medians of both sides as a row."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    spread = ((max(ours) - min(ours)) / mine, (max(theirs) - min(theirs)) / other)
    return Row(case, mine, peer, other, unit, mine / other, goal, spread)


def resident_gib(field: str) -> float:
    """What this process holds in memory, pages of files included: 'VmRSS' now, 'VmHWM' at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"no {field} in /proc/self/status")


def run_in_turn(
    script: Path, names: Sequence[str], arguments: Sequence[str], *, rounds: int, threads: int
) -> dict[str, list[dict[str, Any]]]:
    """What each worker printed, round after round; every run is a fresh process with ``threads`` threads."""
    environment = os.environ | dict.fromkeys(THREADS, str(threads))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        # Who goes first changes, so that a machine that slows down or warms up favours nobody.
        for name in names if number % 2 == 0 else reversed(names):
            command = [sys.executable, str(script), "--worker", name, *arguments]
            run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if run.returncode:
                raise SystemExit(f"worker {name} failed:\n{run.stderr[-5000:]}")
            results[name].append(json.loads(run.stdout.strip().splitlines()[-1]))
    return results


def report(title: str, rows: Sequence[Row], json_file: Path | None) -> None:
    """Print the table; the same rows go to ``json_file``."""
    table = Table(title=title)
    for heading in ("case", "ours", "peer", "peer's", "unit", "ratio", "spread", "goal", "holds"):
        table.add_column(heading, justify="left" if heading in ("case", "peer", "unit") else "right")
    for row in rows:
        holds = {None: "", True: "yes", False: "NO"}[row.holds]
        spread = f"{row.spread[0]:.0%} / {row.spread[1]:.0%}"
        goal = "" if row.goal is None else f"≤ {row.goal:g}"
        values = (f"{row.ours:.4g}", row.peer, f"{row.peer_value:.4g}", row.unit, f"{row.ratio:.3f}", spread, goal)
        table.add_row(row.case, *values, holds)
    Console(width=120).print(table)
    if json_file is not None:
        write_rows(rows, json_file)


def write_rows(rows: Sequence[Row], json_file: Path) -> None:
    """A JSON list of objects with the rows' fields."""
    content = [{**asdict(row), "holds": row.holds} for row in rows]
    json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
