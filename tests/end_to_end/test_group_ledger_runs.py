"""Whole runs with groups that are carried over, with a ledger, and with an end of the questions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from interrupted_run import interrupt
from small_job import SMALL, SmallJob
from test_training import ONE_PROCESS, steps

CARRYING = (
    *ONE_PROCESS,
    "run.save_every=1",
    "filter.oversample=4",
    "filter.carry_surplus=true",
    "algorithm.importance_correction=truncated",
    "data.evaluation=null",
)


def ledger(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "groups.jsonl").read_text().splitlines()]


def test_carried_groups_survive_an_interruption(job: SmallJob) -> None:
    """The ledger and all numbers are those of a run that was not stopped."""
    whole = job.work / "runs" / "carrying"
    result = job.run_warm("train", "train.yaml", "run.name=carrying", *CARRYING)
    assert result.returncode == 0, result.stdout + result.stderr
    run = interrupt(job, "carrying-stopped", *CARRYING, num_steps=4)
    assert max(row["step"] for row in ledger(run)) < 4
    resumed = job.run_warm("train", "train.yaml", "run.name=carrying-stopped", *CARRYING, resume=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    rows = ledger(run)
    assert rows == ledger(whole)
    assert steps(run) == steps(whole)
    carried = {row["draw"] for row in rows if row["decision"] == "carried"}
    used = {row["draw"] for row in rows if row["decision"] == "kept" and row["drawn_step"] < row["step"]}
    assert used
    assert used <= carried
    first_time = Counter(row["draw"] for row in rows if row["drawn_step"] == row["step"])
    assert first_time == Counter(range(max(first_time) + 1))  # every question that was drawn has its row


def test_the_run_ends_where_its_questions_do(job: SmallJob) -> None:
    """Ten questions, once, by four; resumed with nothing left it stays as it is, and goes on with another epoch."""
    lines = (job.data / "train.jsonl").read_text().splitlines()[:10]
    few = job.data / "few.jsonl"
    few.write_text("\n".join(lines) + "\n")
    arguments = (
        *("run.name=epoch", *SMALL, "parallel.tensor=1", "rollout.engine=embedded", "run.steps=9"),
        *(f"data.train={few}", "data.evaluation=null", "filter.no_signal=false"),
    )
    result = job.run_warm("train", "train.yaml", *arguments, "data.epochs=1")
    assert result.returncode == 0, result.stdout + result.stderr
    run = job.work / "runs" / "epoch"
    assert [row["groups/kept"] for row in steps(run)] == [4, 4, 2]
    assert "data.epochs = 1 are used up: 3 steps" in result.stdout + result.stderr
    assert (run / "export" / "config.json").is_file()
    again = job.run_warm("train", "train.yaml", *arguments, "data.epochs=1", resume=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(steps(run)) == 3
    longer = job.run_warm("train", "train.yaml", *arguments, "data.epochs=2", resume=True)
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert [row["groups/kept"] for row in steps(run)] == [4, 4, 2, 4, 4, 2]
    assert [row["draw"] for row in ledger(run)] == list(range(20))


def test_steps_that_keep_nothing_may_pass(job: SmallJob) -> None:
    """A group that is always right would be kept here, but has no signal: nothing is trained."""
    arguments = (*ONE_PROCESS, "run.steps=2", "filter.min_accuracy=1", "filter.max_refills=0", "data.evaluation=null")
    refused = job.run_warm("train", "train.yaml", "run.name=all-refused", *arguments)
    assert "filter.skip_empty_steps=true" in refused.stdout + refused.stderr
    assert refused.returncode == 2
    result = job.run_warm("train", "train.yaml", "run.name=all-skipped", *arguments, "filter.skip_empty_steps=true")
    assert result.returncode == 0, result.stdout + result.stderr
    run = job.work / "runs" / "all-skipped"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["groups/kept"], "loss" in row) for row in rows] == [(1, 0, False), (2, 0, False)]
    assert {row["reason"] for row in ledger(run)} == {"accuracy_low", "no_signal"}
