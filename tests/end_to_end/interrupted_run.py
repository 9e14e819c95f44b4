"""A run that is told to stop while it has steps before it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

from small_job import ENVIRONMENT, REPOSITORY, SmallJob

TRIES = 3
"""A machine that is busy at the wrong moment may let the run end first."""


def interrupt(
    job: SmallJob, name: str, *overrides: str, num_steps: int, after: int = 1, number: signal.Signals = signal.SIGTERM
) -> Path:
    """Start `train`, and send the signal after some of ``num_steps`` steps; the run's folder, when it has stopped."""
    run = job.work / "runs" / name
    command = job.command("train", "train.yaml", f"run.name={name}", *overrides)
    for _ in range(TRIES):
        with subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                while num_made(run) < after and process.poll() is None:
                    time.sleep(0.02)
                process.send_signal(number)
                output, _ = process.communicate(timeout=300)
            finally:
                process.kill()
        if process.returncode == 75 and num_made(run) < num_steps:
            return run
        assert process.returncode in (0, 75), output
        assert num_made(run) == num_steps, output
        shutil.rmtree(run)
    raise AssertionError(f"the run ended before it could be stopped, {TRIES} times")


def num_made(run: Path) -> int:
    """Of training steps, as far as they are logged."""
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().split("\n")[:-1]] if metrics.is_file() else []
    return sum("loss" in row for row in rows)
