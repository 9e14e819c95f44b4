"""`perl-megatron eval` on benchmarks: the tiny policy in the embedded engine, killed and resumed, in two processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import benchmark_copies
import pytest
from small_job import ENVIRONMENT, REPOSITORY, call, call_warm
from tiny_checkpoint import make_policy

from perl_megatron.launch.failures import EXIT_STOPPED
from perl_megatron.launch.ports import free_port

PER_TASK = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    make_policy(folder / "policy")
    benchmark_copies.remi(benchmark_copies.blink(folder / "copies", per_task=PER_TASK))
    settings = {
        "run": {"directory": str(folder / "runs")},
        "model": {"path": str(folder / "policy"), "dtype": "float32"},
        "rollout": {"engine": "embedded", "max_response_tokens": 8},
        "evaluation": {"benchmarks": "blink,remi", "benchmark_folder": str(folder / "copies"), "chunk_size": 2},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


def command(work: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "perl_megatron", "eval", str(work / "config.yaml"), *overrides]


def rows(work: Path, run: str, benchmark: str) -> list[dict]:
    text = (work / "runs" / f"{run}.benchmarks" / f"{benchmark}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_killed_and_resumed(work: Path) -> None:
    """Nothing is asked twice, and the answers are those of a run in one go."""
    whole = call(command(work, "run.name=whole"))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "macro (mean of tasks)" in whole.stdout
    assert "question 24/24" in whole.stderr
    process = subprocess.Popen(
        command(work, "run.name=killed"),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    log = work / "runs" / "killed.benchmarks" / "blink.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    num_before = len(log.read_bytes().split(b"\n")) - 1
    assert 4 <= num_before < 2 * PER_TASK
    resumed = call_warm(command(work, "run.name=killed"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    for benchmark, number in (("blink", 2 * PER_TASK), ("remi", 5)):
        assert rows(work, "killed", benchmark) == rows(work, "whole", benchmark)
        assert len(rows(work, "killed", benchmark)) == number
    results = json.loads((work / "runs" / "killed.benchmarks" / "results.json").read_text())
    assert results["benchmarks"]["blink"]["whole"]["num_questions"] == 2 * PER_TASK
    assert results["benchmarks"]["remi"]["whole"]["num_not_asked"] == 0
    table = call([sys.executable, "-m", "perl_megatron", "results", str(work / "runs" / "killed.benchmarks")])
    assert table.returncode == 0, table.stderr
    assert "killed" in table.stdout
    other = call(command(work, "run.name=killed", "rollout.max_response_tokens=9"))
    assert other.returncode == 2
    assert "max response tokens: 8 -> 9" in other.stderr


def test_two_processes_give_the_same(work: Path) -> None:
    """All ranks answer their share; one of them writes."""
    result = call_warm(command(work, "run.name=two", "parallel.data=2", "evaluation.benchmarks=remi"))
    assert result.returncode == 0, result.stdout + result.stderr
    alone = call_warm(command(work, "run.name=one", "evaluation.benchmarks=remi"))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert rows(work, "two", "remi") == rows(work, "one", "remi")


FAULTY = """
import os, signal, sys, time
from perl_megatron.runtime import environment

environment.prepare_process()
from perl_megatron.runtime import platform

platform.install()
from perl_megatron import cli
from perl_megatron.evaluation.asking import EngineAsker

fault, ask, calls = sys.argv.pop(1), EngineAsker.ask, []

def ask_or_stall_here(asker, views, sampling):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        if fault == "stalls":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGTERM)
    return ask(asker, views, sampling)

EngineAsker.ask = ask_or_stall_here
sys.exit(cli.main())
"""


def two_ranks(work: Path, fault: str, *overrides: str) -> tuple[list[int], str]:
    """Exit statuses and output of two ranks, of which one has a fault at its second chunk."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    argv = command(work, "parallel.data=2", "evaluation.benchmarks=remi", *overrides)[3:]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAULTY, fault, *argv],
            cwd=REPOSITORY,
            env={**ENVIRONMENT, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = "".join(rank.communicate(timeout=500)[0] for rank in ranks)
    return [rank.returncode for rank in ranks], output


def test_a_rank_that_stalls_ends_the_evaluation(work: Path) -> None:
    """Within seconds, not after the thousand that it stalls, or the hours that collectives wait."""
    statuses, output = two_ranks(work, "stalls", "run.name=stalls", "deadlines.generate=20")
    assert statuses == [1, 1], output
    assert "phase 'generate' took longer than deadlines.generate = 20 s" in output
    assert "ranks that the others wait for: 1\n" in output
    assert "in ask_or_stall_here" in output


def test_an_evaluation_that_is_told_to_end_does_so_after_its_chunk_and_goes_on(work: Path) -> None:
    """Also where one rank alone is told."""
    statuses, output = two_ranks(work, "is told to end", "run.name=told")
    assert statuses == [EXIT_STOPPED, EXIT_STOPPED], output
    assert "the same command goes on" in output
    asked = rows(work, "told", "remi")
    assert len(asked) == 4
    result = call_warm(command(work, "run.name=told", "evaluation.benchmarks=remi"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert rows(work, "told", "remi")[:4] == asked
    assert len(rows(work, "told", "remi")) == 5


def test_missing_copies_are_said_before_anything_starts(work: Path) -> None:
    result = call(command(work, "run.name=missing", "evaluation.benchmarks=mmiu"))
    assert result.returncode == 2
    assert "there is no copy of mmiu; the folder holds BLINK, ReMI" in result.stderr
    assert "Traceback" not in result.stderr
