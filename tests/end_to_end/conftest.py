"""The small job that the end-to-end tests share, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from made_once import made_once
from small_job import SmallJob, call


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    work = made_once(tmp_path_factory, "job", make_job)
    return job_in(work)


def job_in(work: Path) -> SmallJob:
    return SmallJob(work, work / "data", work / "policy", work / "runs" / "warm_start" / "export")


def make_job(work: Path) -> None:
    small = job_in(work)
    # Far fewer than the demo's, as each start of a run reads and checks all: three epochs of the warm start.
    few = ("--num-train", "400", "--num-warm-start", "3200", "--num-heldout", "60")
    for command in (
        [sys.executable, "tools/make_digits.py", str(small.data), "--recipe", "examples/demo/digits.yaml", *few],
        # An untied output layer; the engines' contract suite has a tied one, as the demo.
        [sys.executable, "tools/make_tiny_policy.py", str(small.policy), "--init-std", "0.08", "--vision-depth", "2"],
        small.command("sft", "perception.yaml", "run.name=warm_start", "supervised.steps=150"),
    ):
        result = call(command)
        assert result.returncode == 0, result.stdout + result.stderr
