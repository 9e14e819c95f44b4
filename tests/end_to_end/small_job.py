"""Commands of a small real job: digits data, a tiny policy, a short supervised warm start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch_ranks import warm_ranks
from warm_torchrun import can_fork

from perl_megatron.config.layout import launched_processes
from perl_megatron.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
RANK = Path(__file__).with_name("job_rank.py")
SMALL = (
    "run.steps=4",
    "run.save_every=2",
    "rollout.questions_per_step=4",
    "rollout.num_rollouts=4",
    "filter.max_refills=8",
    "evaluation.max_records=6",
    "evaluation.num_orders=2",
)
"""Settings of a run that is over soon."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class SmallJob:
    """Where the shared job lies."""

    work: Path
    data: Path
    policy: Path
    """Random weights."""
    warm: Path
    """After the warm start: answers in the right format, seldom right."""

    def command(self, command: str, config: str, *overrides: str, resume: bool = False) -> list[str]:
        """`perl-megatron COMMAND examples/demo/CONFIG` with this job's paths."""
        paths = [
            f"run.directory={self.work / 'runs'}",
            f"model.path={self.policy if command == 'sft' else self.warm}",
            f"data.train={self.data / ('perception.jsonl' if command == 'sft' else 'train.jsonl')}",
        ]
        if command != "sft":
            paths.append(f"data.evaluation={self.data / 'heldout.jsonl'}")
        head = [sys.executable, "-m", "perl_megatron", command, f"examples/demo/{config}"]
        return [*head, *(["--resume"] if resume else []), *paths, *overrides]

    def run(
        self, command: str, config: str, *overrides: str, resume: bool = False, environment: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end; output is captured."""
        return call(self.command(command, config, *overrides, resume=resume), environment)

    def run_warm(
        self, command: str, config: str, *overrides: str, resume: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """As ``run``, where it is not the start that is tested: see ``call_warm``."""
        return call_warm(self.command(command, config, *overrides, resume=resume))


def call_warm(command: list[str], timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Run a command of a job in ranks that have imported all (``warm_torchrun.py``), under torchrun itself.

    A job of two ranks starts in a second and not in twelve. All output is in ``stdout``.
    """
    if not can_fork():
        return call(command, timeout=timeout)
    arguments = command[3:]  # behind python -m perl_megatron
    overrides = [argument for argument in arguments[2:] if argument != "--resume"]
    processes = launched_processes(load_config(REPOSITORY / arguments[1], overrides).config)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ranks.log"
        with warm_ranks(RANK, *arguments, log=log, processes=processes) as job:
            status = job.wait(timeout)
        return subprocess.CompletedProcess(command, status, stdout=log.read_text(errors="replace"), stderr="")


def call(
    command: list[str], environment: Mapping[str, str] = {}, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root."""
    return subprocess.run(
        command, cwd=REPOSITORY, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=timeout
    )
