"""Mistakes of a user: a clear error before training starts, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
from small_job import SmallJob, call

FAST = ("parallel.tensor=1", "rollout.engine=embedded", "run.steps=1")


def records(job: SmallJob, count: int) -> list[dict]:
    return [json.loads(line) for line in (job.data / "train.jsonl").read_text().splitlines()[:count]]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(job: SmallJob, name: str, *arguments: str) -> str:
    """The error of a run that has to be refused, leaving no folder."""
    result = job.run("train", "train.yaml", f"run.name={name}", *FAST, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert not (job.work / "runs" / name).exists()
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("optimizer.learning_rat=1",), ["optimizer.learning_rate", "did you mean"]),
        (("run.steps=none",), ["run.steps"]),
        (("parallel.tensor=3",), ["parallel.tensor", "heads"]),
        (("parallel.pipeline=3",), ["parallel.pipeline", "layers"]),
        (("data.train=nowhere.jsonl",), ["nowhere.jsonl", "data.train"]),
        (("model.path=nowhere",), ["nowhere", "model.path"]),
        (("permutation.num_permuted=0", "rollout.num_rollouts=1"), ["rollout.num_rollouts"]),
    ],
)
def test_settings(job: SmallJob, arguments: tuple[str, ...], said: list[str]) -> None:
    error = refused(job, "bad-setting", *arguments)
    assert all(part in error for part in said), error


def test_existing_run_folder_and_port_in_use(job: SmallJob) -> None:
    taken = job.work / "runs" / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("keep me")
    result = job.run("train", "train.yaml", "run.name=taken", *FAST)
    assert result.returncode == 2
    assert "taken" in result.stderr
    assert "--resume" in result.stderr
    assert [path.name for path in taken.iterdir()] == ["precious.txt"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        command = job.command("train", "train.yaml", "run.name=port", "parallel.tensor=2")
        result = call([*command, "--master-port", str(port)])
    assert result.returncode == 2
    assert str(port) in result.stderr
    assert not (job.work / "runs" / "port").exists()


def test_data_that_cannot_be_used(job: SmallJob) -> None:
    """An empty file, and one where every record is broken in another way: each is named with its line."""
    empty = job.data / "empty.jsonl"
    empty.write_text("")
    assert "empty" in refused(job, "bad-data", f"data.train={empty}")
    missing, corrupt, mismatch = records(job, 3)
    missing["images"][0] = "train/nowhere.png"
    (job.data / "broken.png").write_bytes(b"\x89PNG but not really")
    corrupt["images"][0] = "broken.png"
    mismatch["text"] = mismatch["text"].replace("<image>", "", 1)
    broken = write(job.data / "broken.jsonl", [missing, corrupt, mismatch])
    error = refused(job, "bad-data", f"data.train={broken}")
    for line, reason in ((1, "nowhere.png"), (2, "broken.png"), (3, "<image>")):
        assert f"broken.jsonl:{line}" in error
        assert reason in error


def test_a_few_corrupt_records_are_dropped_and_named(job: SmallJob) -> None:
    rows = records(job, 40)
    rows[7]["images"][0] = "train/nowhere.png"
    data = write(job.data / "one-broken.jsonl", rows)
    arguments = ("data.max_corrupt_fraction=0.05", "supervised.steps=1", "supervised.batch_size=4", "parallel.data=1")
    for row in rows:
        row["demonstration"] = "<think>1</think>\\boxed{1}"
    write(data, rows)
    result = job.run("sft", "perception.yaml", "run.name=dropped", f"data.train={data}", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "one-broken.jsonl:8" in result.stderr
    assert "39 records, 1 dropped" in result.stderr


def test_a_mistake_found_by_the_ranks_is_said_once(job: SmallJob) -> None:
    """A policy whose weights do not match its config: found in the processes, reported by the launcher."""
    policy = job.work / "damaged"
    shutil.copytree(job.warm, policy)
    weights = next(policy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = job.run("train", "train.yaml", "run.name=damaged", f"model.path={policy}", "rollout.engine=embedded")
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("error:") == 1
    assert weights.name in result.stderr
    assert not (job.work / "runs" / "damaged").exists()


def test_plan_and_doctor(job: SmallJob) -> None:
    plan = call(
        [sys.executable, "-m", "perl_megatron", "plan", "examples/demo/train.yaml", "--json", f"model.path={job.warm}"]
    )
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)
    doctor = call([sys.executable, "-m", "perl_megatron", "doctor"])
    assert doctor.returncode == 0, doctor.stderr
    assert "megatron-core" in doctor.stdout
