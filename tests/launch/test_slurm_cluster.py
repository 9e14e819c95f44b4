"""Two Slurm clusters of tests beside each other on one machine; none is started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import SlurmCluster


@contextmanager
def process_of(cluster: SlurmCluster, job: str) -> Iterator[int]:
    """One that is as a job's: its process id."""
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    environment = {**cluster.environment, "SLURM_JOB_ID": job}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()  # its environment is its own from then on
        yield process.pid
        process.stdin.close()


def test_a_jobs_processes_are_not_those_of_another_clusters_job_of_that_number(tmp_path: Path) -> None:
    here, there = SlurmCluster(tmp_path / "here", ()), SlurmCluster(tmp_path / "there", ())
    with ExitStack() as stack:
        mine, other, theirs = (
            stack.enter_context(process_of(cluster, job)) for cluster, job in ((here, "7"), (here, "8"), (there, "7"))
        )
        assert [process.pid for process in here.processes_of(7)] == [mine]
        assert [process.pid for process in there.processes_of(7)] == [theirs]
        assert {process.pid for process in here.processes()} == {mine, other}
    assert here.processes() == []


def test_clusters_do_not_count_their_jobs_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports of a job follow from its number."""
    monkeypatch.setattr(slurm_cluster, "_daemon", lambda *_, **__: None)
    monkeypatch.setattr(SlurmCluster, "call", lambda *_: "idle")
    first = set()
    for number in range(4):
        cluster = SlurmCluster(tmp_path / str(number), ("perl0",))
        cluster.root.mkdir()
        slurm_cluster._start(cluster)
        lines = (cluster.root / "slurm.conf").read_text().splitlines()
        [value] = [line.removeprefix("FirstJobId=") for line in lines if line.startswith("FirstJobId=")]
        first.add(int(value) % 10000)
    assert len(first) > 1
