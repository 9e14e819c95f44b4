"""The small job that the end-to-end tests share, made once."""

from __future__ import annotations

import sys

import pytest
from small_job import SmallJob, call


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    work = tmp_path_factory.mktemp("job")
    small = SmallJob(work, work / "data", work / "policy", work / "runs" / "warm_start" / "export")
    for command in (
        [sys.executable, "tools/make_digits.py", str(small.data), "--recipe", "examples/demo/digits.yaml"],
        # An untied output layer; the engines' contract suite has a tied one, as the demo.
        [sys.executable, "tools/make_tiny_policy.py", str(small.policy), "--init-std", "0.08", "--vision-depth", "2"],
        small.command("sft", "perception.yaml", "run.name=warm_start", "supervised.steps=150"),
    ):
        result = call(command)
        assert result.returncode == 0, result.stdout + result.stderr
    return small
