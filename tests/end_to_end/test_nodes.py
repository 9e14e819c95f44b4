"""`perl-megatron launch torchrun` on two machines: two agents on loopback, each with a rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from interrupted_run import interrupt
from slurm_cluster import shares_of_cores
from small_job import ENVIRONMENT, REPOSITORY, SMALL, SmallJob
from test_training import evaluations, steps, wait_until

from perl_megatron.launch.ports import free_port

TWO = (*SMALL, "parallel.tensor=1", "parallel.data=2", "rollout.engine=embedded", "rollout.questions_per_call=2")
NODES = (*TWO, "launch.nodes=2")


class Nodes:
    """The agents of one job."""

    def __init__(self, job: SmallJob, *overrides: str, rendezvous: str, resume: bool = False):
        place = (f"launch.endpoint=127.0.0.1:{free_port()}", f"launch.rendezvous={rendezvous}")
        command = [sys.executable, "-m", "perl_megatron", "launch", "torchrun"]
        arguments = job.command("train", "train.yaml", *NODES, *overrides, *place, resume=resume)[4:]
        # A rank has as many threads as on one machine, or sums come out otherwise.
        cores = shares_of_cores(2)
        ranks = [[], []] if rendezvous == "c10d" else [["--node-rank", "0"], ["--node-rank", "1"]]
        self.agents = [
            subprocess.Popen(
                [*command, *rank, *arguments],
                cwd=REPOSITORY,
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=partial(os.sched_setaffinity, 0, cores[number]),  # noqa: PLW1509 - only a system call
            )
            for number, rank in enumerate(ranks)
        ]

    def wait(self) -> list[tuple[int, str]]:
        """Status and output of each."""
        outputs = [agent.communicate(timeout=300)[0] for agent in self.agents]
        return [(agent.returncode, output) for agent, output in zip(self.agents, outputs, strict=True)]


def test_two_machines_are_told_to_go_and_resumed(job: SmallJob) -> None:
    """The second machine alone is told, somewhere in a step; all numbers are those of one machine."""
    whole = job.run_warm("train", "train.yaml", "run.name=one_machine", *TWO)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = job.work / "runs" / "one_machine"
    run = job.work / "runs" / "two_machines"
    nodes = Nodes(job, "run.name=two_machines", "launch.grace_seconds=0.001", rendezvous="static")
    wait_until(lambda: (run / "metrics.jsonl").is_file() and len(steps(run)) >= 1, nodes.agents[0])
    children = [child for agent in nodes.agents for child in psutil.Process(agent.pid).children(recursive=True)]
    nodes.agents[1].send_signal(signal.SIGUSR1)
    for status, output in nodes.wait():
        assert status == 75, output
    assert psutil.wait_procs(children, timeout=10)[1] == []
    done = len(steps(run))
    assert done < 4
    kept = run / "step_in_progress.json"
    if kept.exists():  # it came while groups were collected, as mostly; tests/test_step_in_progress.py has every moment
        assert json.loads(json.loads(kept.read_text())["content"])["drawn"]["step"] == done
    # One machine's logs are told from the other's.
    logs = sorted(path.name.partition("-node-")[2] for path in (run / "logs").iterdir())
    assert logs == ["0", "1"]
    assert len(list((run / "logs").rglob("stdout.log"))) == 2
    resumed = Nodes(job, "run.name=two_machines", rendezvous="c10d", resume=True)
    for status, output in resumed.wait():
        assert status == 0, output
    assert steps(run) == steps(expected)
    assert [row["step"] for row in evaluations(run)] == [0, 4]
    for path in sorted((expected / "export").glob("*.safetensors")):
        assert (run / "export" / path.name).read_bytes() == path.read_bytes()
    sampled = [json.loads(line) for line in (run / "groups.jsonl").read_text().splitlines()]
    assert sampled == [json.loads(line) for line in (expected / "groups.jsonl").read_text().splitlines()]


def test_a_machine_that_does_not_come_ends_the_launch(job: SmallJob) -> None:
    begin = time.monotonic()
    place = (f"launch.endpoint=127.0.0.1:{free_port()}", "launch.rendezvous_timeout=3", "run.name=alone")
    arguments = job.command("train", "train.yaml", *NODES, *place)[4:]
    command = [sys.executable, "-m", "perl_megatron", "launch", "torchrun", "--node-rank", "0", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert "timed out" in result.stderr.lower() or "timeout" in result.stderr.lower(), result.stderr
    assert time.monotonic() - begin < 100
    assert not (job.work / "runs" / "alone").exists()


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.001), (signal.SIGTERM, 600)])
def test_ctrl_c_or_time_enough_lets_the_step_end(job: SmallJob, number: signal.Signals, seconds: float) -> None:
    name = f"finished-{number.name}"
    settings = (*SMALL, "parallel.tensor=1", "rollout.engine=embedded", "rollout.questions_per_call=1")
    run = interrupt(job, name, *settings, f"launch.grace_seconds={seconds}", num_steps=4, number=number)
    assert not (run / "step_in_progress.json").exists()
