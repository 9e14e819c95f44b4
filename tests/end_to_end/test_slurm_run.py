"""A run in a real Slurm: submitted, preempted by a signal, queued again, resumed, finished."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import running_cluster, slurm_obstacle
from small_job import ENVIRONMENT, REPOSITORY, SMALL, SmallJob
from test_training import evaluations, steps

pytestmark = [
    pytest.mark.skipif(slurm_obstacle() is not None, reason=str(slurm_obstacle())),
    pytest.mark.timeout(900),
]

SETTINGS = (
    *SMALL,
    "run.steps=6",
    "parallel.tensor=1",
    "parallel.data=2",
    "rollout.engine=embedded",
    "rollout.questions_per_call=1",
    "data.evaluation=null",
)


def test_a_run_is_preempted_queued_again_and_gives_the_numbers_of_an_uninterrupted_one(
    job: SmallJob, tmp_path: Path
) -> None:
    """On two nodes. The signal is what Slurm sends before a job's time is over; it may come at any moment of a step."""
    whole = job.run("train", "train.yaml", "run.name=not_in_slurm", *SETTINGS)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected, run = job.work / "runs" / "not_in_slurm", job.work / "runs" / "in_slurm"
    with running_cluster(tmp_path, 2) as cluster:
        launch = ("launch.nodes=2", "launch.time=20", "launch.grace_seconds=0.001", "run.name=in_slurm")
        arguments = job.command("train", "train.yaml", *SETTINGS, *launch)[4:]
        submit = subprocess.run(
            [sys.executable, "-m", "perl_megatron", "launch", "slurm", *arguments],
            cwd=REPOSITORY,
            env=cluster.environment | ENVIRONMENT | {"SLURM_CONF": cluster.environment["SLURM_CONF"]},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert submit.returncode == 0, submit.stderr
        number = int(submit.stdout.split()[1].rstrip(":"))
        log = run.with_name("in_slurm.slurm") / f"job-{number}.log"
        until = time.monotonic() + 200
        while not (run / "metrics.jsonl").is_file() or len(steps(run)) < 2:
            assert time.monotonic() < until, log.read_text()
            assert cluster.job(number)["JobState"] in ("PENDING", "RUNNING"), log.read_text()
            time.sleep(0.1)
        cluster.call("scancel", "--batch", "--signal=USR1", str(number))
        done = cluster.wait(number, lambda job: job["JobState"] in ("COMPLETED", "FAILED"))
    said = log.read_text()
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), said
    assert "queued again, to resume" in said
    assert steps(run) == steps(expected)
    assert (run / "groups.jsonl").read_bytes() == (expected / "groups.jsonl").read_bytes()
    assert evaluations(run) == []
    for path in sorted((expected / "export").glob("*.safetensors")):
        assert (run / "export" / path.name).read_bytes() == path.read_bytes()
    # Each start's logs, node by node.
    starts = sorted(path.name for path in log.parent.iterdir() if path.is_dir())
    assert starts == [f"job-{number}.0", f"job-{number}.1"]
    assert len(list(log.parent.rglob("node-*/**/stdout.log"))) == 4
