"""A real sweep of the demo's task: two workers, two processes a run; one worker is killed in the middle of a run."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState
from small_job import ENVIRONMENT, REPOSITORY, SMALL, SmallJob

from perl_megatron.config.sweep_file import read_sweep
from perl_megatron.sweep.storage import point_of
from perl_megatron.sweep.study import read_study

SWEEP = """
sweep:
  name: rates
  config: examples/demo/train.yaml
  directory: {work}/sweeps
  overrides: {overrides}
  seed_overrides: [model.path={warm}]
  sampler: grid
  measures: "evaluation/flip_rate,groups/kept:sum"
workers: {{heartbeat: 1, grace: 4, keep_weights: false}}
pruner: {{kind: asha, min_steps: 4, reduction_factor: 2}}
space:
  optimizer.learning_rate: [1.0e-4, 3.0e-4]
"""


def logged_steps(folder: Path) -> list[int]:
    """The training steps in a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [row["step"] for row in map(json.loads, lines) if "loss" in row]


def worker_of(sweep: psutil.Process, folder: Path) -> psutil.Process:
    """The worker whose run is in a folder."""
    for worker in sweep.children():
        if any(f"run.directory={folder.parent}" in child.cmdline() for child in worker.children()):
            return worker
    raise AssertionError(f"no worker runs {folder}")


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(job: SmallJob, tmp_path: Path) -> None:
    overrides = [
        *(*SMALL, "run.save_every=1", "evaluation.every=2", "rollout.engine=embedded"),
        *(f"data.train={job.data / 'train.jsonl'}", f"data.evaluation={job.data / 'heldout.jsonl'}"),
    ]
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(work=tmp_path, overrides=json.dumps(overrides), warm=job.warm))
    sweep = read_sweep(path)
    runs = [sweep.folder / f"point-{point:04d}" / "seed-0" for point in range(2)]
    command = [*job.command("train", "train.yaml")[:3], "sweep", str(path), "--workers", "2"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not any((runs[0] / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    worker_of(psutil.Process(process.pid), runs[0]).kill()
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "point-0000, seed-0: continues" in output

    trials = read_study(sweep).get_trials()
    finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert sorted(map(point_of, finished)) == [0, 1]
    assert [point_of(trial) for trial in trials if trial.state == TrialState.FAIL] == [0]
    for run in runs:
        assert logged_steps(run) == [1, 2, 3, 4]
        assert not (run / "checkpoints").exists()  # workers.keep_weights
    for trial in finished:
        assert list(trial.intermediate_values) == [0, 2, 4]
    content = json.loads((sweep.folder / "results.json").read_text())
    assert {point["optimizer.learning_rate"] for point in content["points"]} == {1e-4, 3e-4}
    assert sum(point["attempts"] for point in content["points"]) == 3
    complete = [point for point in content["points"] if point["state"] == "complete"]
    assert all(0 < point["groups/kept:sum"] <= 16 for point in complete)
    assert (sweep.folder / "curves.png").is_file()
