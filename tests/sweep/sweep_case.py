"""A sweep file of the tests, and the workers that carry it out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna

from perl_megatron.config.sweep_file import Sweep, read_sweep
from perl_megatron.sweep.study import read_study

DRIVER = Path(__file__).with_name("worker_driver.py")
LONGEST = 400.0
"""Seconds that a worker may take, with its imports, on a machine that does other things too."""
REPOSITORY = Path(__file__).parents[2]
CONFIG = """
model: {path: examples/qwen2_5_vl/3b}
data: {train: DATA, evaluation: DATA}
algorithm: {aggregation: sequence}
"""


@dataclass(frozen=True)
class SweepCase:
    """A sweep in a folder of its own."""

    folder: Path
    path: Path

    @property
    def sweep(self) -> Sweep:
        return read_sweep(self.path)

    @property
    def study(self) -> optuna.Study:
        return read_study(self.sweep)

    def start(self) -> subprocess.Popen[str]:
        """A worker."""
        return subprocess.Popen(
            [sys.executable, str(DRIVER), str(self.path), str(self.folder)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def work(self) -> tuple[int, str]:
        """One worker, until its end: (status, output)."""
        worker = self.start()
        output, _ = worker.communicate(timeout=LONGEST)
        return worker.returncode, output

    @property
    def hold(self) -> Path:
        """While this file is there, a run stays after its second step."""
        return self.folder / "hold"

    def steps(self, point: int, seed: int = 0) -> list[tuple[int, int]]:
        """(step, process id) of all that the runs of one point have made."""
        path = self.folder / f"sweeps/case/point-{point:04d}/seed-{seed}/steps"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(step), int(process)) for step, process in map(str.split, lines)]


def make_case(folder: Path, text: str) -> SweepCase:
    """Write the sweep file; ``text`` follows the section that names the sweep."""
    data = folder / "data.jsonl"
    data.write_text("{}\n")
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("DATA", str(data)))
    path = folder / "sweep.yaml"
    path.write_text(f"sweep:\n  name: case\n  config: {config}\n  directory: {folder / 'sweeps'}\n{text}")
    return SweepCase(folder, path)


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Poll; fails where one of the processes ends before."""
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
