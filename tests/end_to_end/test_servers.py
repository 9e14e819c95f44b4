"""Training with vLLM servers, as a user starts both: `perl-megatron serve` and `perl-megatron train`."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from interrupted_run import interrupt, num_made
from small_job import ENVIRONMENT, REPOSITORY, SMALL, SmallJob

from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.launch.ports import free_port
from perl_megatron.rollout.engine import vllm_obstacle

VLLM = vllm_obstacle(cuda=False)
pytestmark = [pytest.mark.skipif(VLLM is not None, reason=str(VLLM)), pytest.mark.timeout(600)]

ONE_STEP_OFF = ("rollout.max_staleness=1", "algorithm.old_policy=engine")


@pytest.fixture(scope="module")
def key_file(job: SmallJob) -> Path:
    file = job.work / "key"
    file.write_text("a-key-of-some-length\n")
    return file


@pytest.fixture(scope="module")
def server(job: SmallJob, key_file: Path) -> Iterator[tuple[str, ...]]:
    """The settings with which a run uses the server."""
    port, log = free_port(), job.work / "server.log"
    command = [*job.command("serve", "train.yaml", f"rollout.api_key_file={key_file}"), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    until = time.monotonic() + 300
    try:
        while not _is_healthy(address):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield ("rollout.engine=server", f"rollout.servers={address}", f"rollout.api_key_file={key_file}")
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        process.wait(60)
        assert psutil.wait_procs(tree, timeout=10)[1] == []
    finally:
        process.kill()


def _is_healthy(address: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{address}/health", timeout=5, trust_env=False).is_success
    return False


def run(job: SmallJob, name: str, *overrides: str, **options: bool) -> list[dict]:
    """The logged training steps."""
    result = job.run_warm("train", "train.yaml", f"run.name={name}", *SMALL, *overrides, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (job.work / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def versions(job: SmallJob, name: str, step: int) -> set[int]:
    """Of the weights that sampled a step's tokens."""
    return {version for row in recorded(job, name, step) for version, _, _ in row["weight_versions"]}


def recorded(job: SmallJob, name: str, step: int) -> list[dict]:
    """The recorded rollouts of a step."""
    path = job.work / "runs" / name / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_strictly_on_policy_gives_the_numbers_of_the_colocated_engine(job: SmallJob, server: tuple[str, ...]) -> None:
    expected = run(job, "colocated", "rollout.engine=vllm", "parallel.tensor=1")
    found = run(job, "served", *server, "parallel.tensor=1")
    for row, reference in zip(found, expected, strict=True):
        for name in ("reward/mean", "groups/kept", "response/length_mean", "num_tokens"):
            assert row[name] == reference[name], (row["step"], name)
        for name in ("loss", "entropy", "gradient_norm"):
            assert row[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-5), (row["step"], name)
        assert 0 < row["logprob_gap/mean"] <= 1e-4
        assert row["rollout/staleness_max"] == 0
        assert 0 < row["data/idle_share"] < 1
        assert 0 < row["rollout/image_hit_rate"] < 1
    assert [versions(job, "served", step) for step in (1, 2, 3, 4)] == [{0}, {1}, {2}, {3}]


def test_one_step_off_on_two_processes(job: SmallJob, server: tuple[str, ...]) -> None:
    """Every step but the first is sampled by the weights before the last update, and the objective knows."""
    rows = run(job, "ahead", *server, *ONE_STEP_OFF, "parallel.tensor=2", "optimizer.learning_rate=1e-3")
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["data/idle_share"] > 0  # its questions are drawn by the trainer itself
    assert all(0 <= row["data/idle_share"] < 1 for row in rows)
    assert [row["rollout/staleness_mean"] for row in rows] == [0, 1, 1, 1]
    assert [versions(job, "ahead", step) for step in (1, 2, 3, 4)] == [{0}, {0}, {1}, {2}]
    # π_θ / π_old is 1 at the start of an on-policy step; later π_old is the policy of a step ago.
    assert rows[0]["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert all(abs(row["ratio_mean"] - 1) > 1e-4 for row in rows[1:])


def test_one_step_off_is_ended_and_resumed_without_losing_a_record(job: SmallJob, server: tuple[str, ...]) -> None:
    """SIGTERM gives up what is under way, after a checkpoint; it is drawn again, on-policy."""
    settings = (*SMALL, *server, *ONE_STEP_OFF, "parallel.tensor=2", "data.evaluation=null", "run.steps=6")
    done = num_made(interrupt(job, "resumed_ahead", *settings, num_steps=6, after=2))
    rows = run(job, "resumed_ahead", *settings, resume=True)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    expected = [0, *[1] * 5]
    expected[done] = 0  # the first step after the resume
    assert [row["rollout/staleness_max"] for row in rows] == expected
    drawn = {row["record"] for step in range(1, 7) for row in recorded(job, "resumed_ahead", step)}
    records = [json.loads(line)["id"] for line in (job.data / "train.jsonl").read_text().splitlines()]
    order = ShuffledSampler(len(records), seed=0).next(len(drawn))
    assert drawn == {records[index] for index in order}


def test_a_server_refuses_whoever_has_no_key(job: SmallJob, server: tuple[str, ...], tmp_path: Path) -> None:
    """On the routes that bring weights and call workers too, which vLLM leaves open."""
    address = server[1].removeprefix("rollout.servers=")
    for headers in ({}, {"Authorization": "Bearer another-key-of-length"}):
        for path in ("v1/models", "weight_info", "metrics", "openapi.json"):
            assert httpx.get(f"{address}/{path}", headers=headers, trust_env=False).status_code == 401
        for path in ("pause", "collective_rpc", "update_weights", "inference/v1/generate", "start_weight_update"):
            assert httpx.post(f"{address}/{path}", headers=headers, trust_env=False).status_code == 401
    wrong = tmp_path / "wrong"
    wrong.write_text("another-key-of-length\n")
    overrides = (*server[:2], f"rollout.api_key_file={wrong}", "run.name=locked_out")
    result = job.run("eval", "train.yaml", *overrides, "parallel.tensor=1", "evaluation.max_records=1")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "it does not take the key" in result.stderr


def test_a_policy_is_evaluated_by_a_server(job: SmallJob, server: tuple[str, ...]) -> None:
    """Whatever weights the server had before, it is brought those of `model.path`."""
    settings = ("parallel.tensor=1", "evaluation.max_records=6", "evaluation.num_orders=2")
    answers = []
    for name, engine in (("by_server", server), ("by_transformers", ("rollout.engine=embedded",))):
        result = job.run_warm("eval", "train.yaml", f"run.name={name}", *engine, *settings)
        assert result.returncode == 0, result.stdout + result.stderr
        lines = (job.work / "runs" / f"{name}.evaluation.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["response"] for line in lines])
    assert answers[0] == answers[1]
