"""Whole runs of `perl-megatron train` on CPU; one of each kind as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from interrupted_run import interrupt
from small_job import ENVIRONMENT, REPOSITORY, SMALL, SmallJob, call

from perl_megatron.rollout.engine import vllm_obstacle

CONTEXT = ("parallel.context=2", "actor.sharing=vision")
ONE_PROCESS = (*SMALL, "parallel.tensor=1", "rollout.engine=embedded")
TIMES = ("time", "seconds/", "memory/", "throughput/", "sync/seconds", "save/", "data/")


def steps(run: Path) -> list[dict]:
    """The logged training steps, without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows if "loss" in row]


def evaluations(run: Path) -> list[dict]:
    """The logged evaluations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "evaluation/accuracy" in row]


@pytest.fixture(scope="module")
def reference(job: SmallJob) -> Path:
    """An uninterrupted run in one process."""
    result = job.run_warm("train", "train.yaml", "run.name=reference", *ONE_PROCESS)
    assert result.returncode == 0, result.stdout + result.stderr
    return job.work / "runs" / "reference"


@pytest.mark.skipif(vllm_obstacle(cuda=False) is not None, reason="vLLM cannot run on this platform")
def test_tensor_parallel_with_vllm(job: SmallJob) -> None:
    """The demo's own layout and engine: rollouts agree with the trainer, and the run leaves what README promises."""
    result = job.run("train", "train.yaml", "run.name=vllm", *SMALL, "rollout.engine=vllm")
    assert result.returncode == 0, result.stdout + result.stderr
    run = job.work / "runs" / "vllm"
    logged = steps(run)
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert all(0 < row["logprob_gap/mean"] <= 1e-4 for row in logged)
    assert logged[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert logged[0]["gradient_norm"] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["engine"] == "vllm"
    assert summary["layout"] == "tensor 2 × pipeline 1 × context 1 × data 1"
    assert summary["groups_kept"] > 0
    assert summary["accuracy_before"] is not None
    assert summary["logprob_gap_mean"] <= 1e-4
    for name in ("report.html", "curves.png", "config.yaml", "export/config.json", "rollouts/step-000004.jsonl"):
        assert (run / name).is_file(), name
    for name in ("tensorboard", "checkpoints", "logs"):
        assert list((run / name).iterdir()), name
    assert "held-out accuracy" in result.stdout


def test_interrupted_and_resumed_is_bit_for_bit(job: SmallJob, reference: Path) -> None:
    """SIGTERM ends after the current step with a checkpoint; --resume then gives the uninterrupted run's numbers."""
    run = interrupt(job, "resumed", *ONE_PROCESS, num_steps=4)
    resumed = job.run_warm("train", "train.yaml", "run.name=resumed", *ONE_PROCESS, resume=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert steps(run) == steps(reference)
    assert [row["step"] for row in evaluations(run)] == [row["step"] for row in evaluations(reference)] == [0, 4]
    for path in sorted((reference / "export").glob("*.safetensors")):
        assert (run / "export" / path.name).read_bytes() == path.read_bytes()


def test_layouts_give_the_same_first_loss(job: SmallJob, reference: Path) -> None:
    """Two processes in every way against one process, on the same rollouts."""
    expected = steps(reference)[0]
    for name, layout in (
        ("pipeline", ("parallel.tensor=1", "parallel.pipeline=2")),
        ("interleaved", ("parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2")),
        ("context", ("parallel.tensor=1", *CONTEXT)),
        ("tensor", ("parallel.tensor=2",)),
    ):
        arguments = (f"run.name={name}", *SMALL, "run.steps=1", "optimizer.schedule=constant", *layout)
        result = job.run_warm("train", "train.yaml", *arguments, "rollout.engine=embedded", "data.evaluation=null")
        assert result.returncode == 0, result.stdout + result.stderr
        first = steps(job.work / "runs" / name)[0]
        assert first["num_tokens"] == expected["num_tokens"]
        assert first["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        # At the first update the ratio is 1, so the loss depends on rewards alone; these depend on the logits.
        assert first["entropy"] == pytest.approx(expected["entropy"], abs=1e-5)
        assert 0 < first["logprob_gap/mean"] <= 1e-4
        assert first["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


def test_the_gap_between_engine_and_trainer_is_measured_and_corrected(job: SmallJob, reference: Path) -> None:
    """Where the gap is rounding alone, weights are 1 all but exactly, and so is the ratio to the engine's own."""
    expected = steps(reference)[0]
    arguments = (
        *SMALL,
        "run.steps=1",
        "optimizer.schedule=constant",
        "rollout.engine=embedded",
        "data.evaluation=null",
    )
    for name, settings in (
        ("masked", (*("algorithm.importance_correction=masked", "parallel.tensor=1"), *CONTEXT)),
        ("engine", ("algorithm.old_policy=engine", "parallel.tensor=1")),
    ):
        result = job.run_warm("train", "train.yaml", f"run.name={name}", *arguments, *settings)
        assert result.returncode == 0, result.stdout + result.stderr
        first = steps(job.work / "runs" / name)[0]
        assert first["num_tokens"] == expected["num_tokens"]
        assert first["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert first["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
        gap = [value for key, value in first.items() if key.startswith("logprob_gap/mean")]
        if name == "engine":
            assert gap == []
            assert 1 < first["ratio_max"] <= 1 + 1e-4  # exactly 1 against the trainer's own
        else:
            assert len(gap) > 3  # all, original, permuted, and at least one number of images
            assert 0 < max(gap) <= 1e-4
            assert 0 <= first["logprob_gap/kl_k3"] <= 1e-6
            assert 0 < abs(first["importance/mean"] - 1) <= 1e-4
            assert first["importance/masked"] == 0


def test_a_resumed_run_keeps_its_settings(job: SmallJob, reference: Path) -> None:
    result = job.run(
        "train", "train.yaml", "run.name=reference", *ONE_PROCESS, "permutation.num_permuted=0", resume=True
    )
    assert result.returncode == 2
    assert "permutation.num_permuted: 1 -> 0" in result.stderr


def test_ctrl_c_on_two_processes_leaves_none_behind(job: SmallJob) -> None:
    run = job.work / "runs" / "interrupted"
    process = subprocess.Popen(
        job.command("train", "train.yaml", "run.name=interrupted", *SMALL, "run.steps=50", "rollout.engine=embedded"),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: (run / "metrics.jsonl").is_file() and len(steps(run)) >= 1, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert list((run / "checkpoints").glob("step-*"))
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_evaluation_of_the_export(job: SmallJob, reference: Path) -> None:
    """`eval` on the exported policy repeats the run's own last evaluation."""
    result = job.run_warm("eval", "train.yaml", "run.name=again", *ONE_PROCESS, f"model.path={reference / 'export'}")
    assert result.returncode == 0, result.stdout + result.stderr
    again = (job.work / "runs" / "again.evaluation.jsonl").read_text()
    assert again == (reference / "evaluations" / "step-000004.jsonl").read_text()


def test_triage_of_a_run(job: SmallJob, reference: Path) -> None:
    """Engine and trainer of a real run agree with transformers, on weights that the run itself made."""
    file = job.work / "triage.json"
    result = call([sys.executable, "-m", "perl_megatron", "triage", str(reference), "--json", str(file)])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "16 rollouts of step 3, weights of version 2" in result.stdout
    report = json.loads(file.read_text())
    assert report["agrees"]
    judged = {party: (verdict["num_rollouts"], verdict["causes"]) for party, verdict in report["parties"].items()}
    assert judged == {"engine": (16, []), "trainer": (16, [])}
    assert 0 < report["engine_against_trainer"][0] < 1e-4


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)
