"""A run over several sources whose questions are checked as they are drawn, on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_job import SMALL, SmallJob

pytestmark = pytest.mark.slow


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_sources_with_broken_images(job: SmallJob) -> None:
    rows = [json.loads(line) for line in (job.data / "train.jsonl").read_text().splitlines()[:24]]
    for number in (1, 2, 14):
        rows[number]["images"][0] = "train/nowhere.png"
    broken = {rows[number]["id"] for number in (1, 2, 14)}
    first, second = write(job.data / "first.jsonl", rows[:6]), write(job.data / "second.jsonl", rows[6:])
    sources = (f"data.train=[{first}, {second}]", "data.weights=[1, 1]", "data.check=draw")
    quiet = ("data.max_corrupt_fraction=0.5", "filter.no_signal=false", "rollout.engine=embedded", "evaluation.every=0")
    result = job.run_warm("train", "train.yaml", "run.name=drawn", *SMALL, *sources, *quiet)
    assert result.returncode == 0, result.stdout + result.stderr

    ledger = job.work / "runs" / "drawn" / "groups.jsonl"
    groups = [json.loads(line) for line in ledger.read_text().splitlines()]
    unusable = [group for group in groups if group["reason"] == "unusable"]
    assert {group["record"] for group in unusable} <= broken
    assert {rows[1]["id"], rows[2]["id"]} <= {group["record"] for group in unusable}  # the small source's whole epoch
    assert all("not found" in group["problem"] for group in unusable)
    assert [group["draw"] for group in groups] == list(range(len(groups)))
    assert sum(group["decision"] == "kept" for group in groups) == 16  # 4 steps of 4
    of_first = sum(group["record"] in {row["id"] for row in rows[:6]} for group in groups)
    assert abs(of_first - len(groups) / 2) < 1
    assert (job.data / ".first.jsonl.index").is_file()
    assert (job.data / ".second.jsonl.index").is_file()
