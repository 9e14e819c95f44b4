"""Runs in a real Slurm of two nodes: submitted, preempted, queued again, resumed, finished."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from slurm_cluster import SlurmCluster, running_cluster, slurm_obstacle
from small_job import ENVIRONMENT, REPOSITORY, SMALL, SmallJob
from test_training import evaluations, steps

from perl_megatron.errors import UserError
from perl_megatron.launch.ports import free_port
from perl_megatron.observability.run_lock import RunLock
from perl_megatron.rollout.engine import vllm_obstacle

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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm"), 2) as found:
        yield found


def submit(cluster: SlurmCluster, *arguments: str) -> str:
    """What `perl-megatron ARGUMENTS` prints on the login node."""
    command = [sys.executable, "-m", "perl_megatron", *arguments]
    environment = cluster.environment | ENVIRONMENT | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


class Submitted:
    """A run in a job."""

    def __init__(self, cluster: SlurmCluster, job: SmallJob, name: str, *settings: str):
        self.cluster, self.run = cluster, job.work / "runs" / name
        arguments = job.command("train", "train.yaml", *settings, f"run.name={name}", "launch.time=20")[4:]
        self.number = int(submit(cluster, "launch", "slurm", *arguments).split()[1].rstrip(":"))
        self.log = self.run.with_name(f"{name}.slurm") / f"job-{self.number}.log"

    def await_steps(self, number: int) -> None:
        """Until it has logged so many."""
        await_steps(self.run, number, self.said)

    def kill_once_there_is_a_folder(self) -> None:
        """Its ranks, by SIGKILL, before they have made a step."""
        until = time.monotonic() + 240
        while not (self.run / "config.yaml").is_file():
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)
        for process in self.cluster.processes_of(self.number):
            with suppress(psutil.NoSuchProcess):
                if "RANK" in process.environ():
                    process.kill()

    def preempt(self) -> None:
        """Let Slurm do it: a job of a partition that goes first needs all nodes."""
        self.cluster.call("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap", "true")

    def said(self) -> str:
        """All that it has printed."""
        return "\n".join(log.read_text() for log in sorted(self.log.parent.glob(f"job-{self.number}.*log")))

    def end(self) -> dict[str, str]:
        """Until it is over; nothing of it is left then."""
        ends = ("COMPLETED", "FAILED", "CANCELLED")
        done = self.cluster.wait(self.number, lambda job: job["JobState"] in ends)
        assert self.cluster.processes_of(self.number) == []
        return done


def await_steps(run: Path, number: int, said: Callable[[], str]) -> None:
    """Until the run has logged so many."""
    until = time.monotonic() + 240
    while not (run / "metrics.jsonl").is_file() or len(steps(run)) < number:
        assert time.monotonic() < until, said()
        time.sleep(0.1)


def test_a_run_is_killed_and_preempted_and_gives_the_numbers_of_an_uninterrupted_one(
    cluster: SlurmCluster, job: SmallJob
) -> None:
    """On two nodes: killed before its first checkpoint, preempted by the signal that Slurm sends before a job's time is
    over, and by a job that goes first; these may come at any moment of a step.
    """
    whole = job.run_warm("train", "train.yaml", "run.name=not_in_slurm", *SETTINGS)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = job.work / "runs" / "not_in_slurm"
    launch = ("launch.nodes=2", "launch.grace_seconds=0.001")
    submitted = Submitted(cluster, job, "in_slurm", *SETTINGS, *launch)
    submitted.kill_once_there_is_a_folder()
    cluster.wait(submitted.number, lambda job: job["JobState"] == "FAILED")
    assert list((submitted.run / "checkpoints").glob("step-*")) == []
    cluster.call("scontrol", "requeue", str(submitted.number))
    cluster.wait(submitted.number, lambda job: job["Restarts"] == "1")
    submitted.await_steps(1)
    with pytest.raises(UserError, match="another job trains this run"):
        RunLock(submitted.run / "lock").acquire(0)
    cluster.call("scancel", "--batch", "--signal=USR1", str(submitted.number))
    cluster.wait(submitted.number, lambda job: job["Restarts"] == "2")
    submitted.await_steps(len(steps(submitted.run)) + 1)
    submitted.preempt()
    done, said, run = submitted.end(), submitted.said(), submitted.run
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "3"), said
    assert "no checkpoint was written yet: the run begins anew" in said
    assert said.count("queued again, to resume") == 2
    assert steps(run) == steps(expected)
    assert (run / "groups.jsonl").read_bytes() == (expected / "groups.jsonl").read_bytes()
    assert evaluations(run) == []
    for path in sorted((expected / "export").glob("*.safetensors")):
        assert (run / "export" / path.name).read_bytes() == path.read_bytes()
    # Each start's logs, node by node.
    starts = sorted(path.name for path in submitted.log.parent.iterdir() if path.is_dir())
    assert starts == [f"job-{submitted.number}.{start}" for start in range(4)]
    assert len(list(submitted.log.parent.rglob("node-*/**/stdout.log"))) == 8


@pytest.mark.slow
@pytest.mark.skipif(vllm_obstacle(cuda=False) is not None, reason=str(vllm_obstacle(cuda=False)))
def test_servers_beside_the_trainer_outlive_its_last_step_when_it_is_preempted(
    cluster: SlurmCluster, job: SmallJob
) -> None:
    servers = ("launch.rollout_nodes=1", f"launch.server_port={free_port()}", "rollout.cpu_cache_gib=0.25")
    settings = (*SMALL, "run.steps=3", "parallel.tensor=1", "data.evaluation=null", *servers)
    submitted = Submitted(cluster, job, "with_servers", *settings)
    submitted.await_steps(1)
    submitted.preempt()
    done, said = submitted.end(), submitted.said()
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), said
    assert "queued again, to resume" in said
    rows = steps(submitted.run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert list((submitted.run / "export").glob("*.safetensors")) != []
    assert len(list(submitted.log.parent.glob("job-*.servers-0.log"))) == 2  # one for each start


SWEEP = """
sweep:
  name: on_two_nodes
  config: examples/demo/train.yaml
  directory: {work}/sweeps
  overrides: {overrides}
  sampler: grid
  metric: reward/mean
workers: {{heartbeat: 1, grace: 4}}
space: {{optimizer.learning_rate: [1.0e-4]}}
"""


@pytest.mark.slow
def test_a_trial_of_a_sweep_has_two_nodes(cluster: SlurmCluster, job: SmallJob, tmp_path: Path) -> None:
    """Its worker is told to go in the middle, is queued again, and resumes the run."""
    num_steps = 12  # so many that the run is still going when its worker is told
    data = (f"data.train={job.data / 'train.jsonl'}", f"model.path={job.warm}")
    overrides = json.dumps([*SETTINGS, f"run.steps={num_steps}", "run.save_every=1", "launch.nodes=2", *data])
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP.format(work=tmp_path, overrides=overrides))
    number = int(submit(cluster, "sweep", str(file), "--slurm", "1").split("job array ")[1].partition(":")[0])
    folder = tmp_path / "sweeps" / "on_two_nodes"
    run = folder / "point-0000" / "seed-0"

    def said() -> str:
        return "\n".join(log.read_text() for log in (*folder.glob("*.log"), *folder.glob("point-*/*.log")))

    await_steps(run, 1, said)
    cluster.call("scancel", "--batch", "--signal=TERM", f"{number}_0")
    done = cluster.wait(number, lambda job: job["JobState"] in ("COMPLETED", "FAILED"))
    assert (done["JobState"], done["Restarts"], done["NumNodes"]) == ("COMPLETED", "1", "2"), said()
    assert "point-0000, seed-0: continues" in said()
    assert [row["step"] for row in steps(run)] == list(range(1, num_steps + 1))
    assert {path.name.partition("-node-")[2] for path in (run / "logs").iterdir()} == {"0", "1"}
    assert cluster.processes_of(number) == []
    assert list(folder.glob("point-*/*.stop")) == []
