"""Starts a worker script on several ranks under torchrun. Nothing that it started outlives the call, also on a hang."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from warm_torchrun import WarmJob, can_fork

TESTS = Path(__file__).resolve().parent
TAIL = 5000
"""Characters of the ranks' output that a failure shows."""


def launch_ranks(
    worker: Path, *arguments: object, log: Path, processes: int = 2, timeout: float = 500, path: Sequence[Path] = ()
) -> None:
    """Run ``worker`` to its end; the test fails, with the end of the output, if a rank does or the time is over.

    ``log`` gets the output of all ranks; ``path`` comes first on the ranks' module path, before the repository and
    tests/. One process runs without torchrun. The ranks are warm (``warm_torchrun.py``) where ``path`` is empty.
    """
    started: AbstractContextManager[subprocess.Popen[bytes] | WarmJob]
    if not path and can_fork():
        started = warm_ranks(worker, *arguments, log=log, processes=processes)
    else:
        started = running_ranks(worker, *arguments, log=log, processes=processes, path=path)
    with started as job:
        try:
            status = job.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{worker.name} had not ended after {timeout} s\n{_tail(log)}", pytrace=False)
    if status:
        pytest.fail(f"{worker.name} ended with status {status}\n{_tail(log)}", pytrace=False)


@contextmanager
def running_ranks(
    worker: Path, *arguments: object, log: Path, processes: int = 2, path: Sequence[Path] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The running torchrun; when the block is left, it and all that it started are killed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(worker), *map(str, arguments)]
    with log.open("wb") as output:
        job = subprocess.Popen(command, env=_environment(path), stdout=output, stderr=subprocess.STDOUT)
        try:
            yield job
        finally:
            _kill_tree(job)


@contextmanager
def warm_ranks(worker: Path, *arguments: object, log: Path, processes: int = 2) -> Iterator[WarmJob]:
    """As ``running_ranks``, with ranks that have imported all (``warm_torchrun.py``), so no path can come first."""
    job = WarmJob(worker, list(map(str, arguments)), processes, _environment(), log)
    try:
        yield job
    finally:
        _kill_tree(job)


def _environment(path: Sequence[Path] = ()) -> dict[str, str]:
    inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    places = os.pathsep.join([*map(str, (*path, TESTS.parent, TESTS)), *inherited])
    return os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}


def _kill_tree(job: subprocess.Popen[bytes] | WarmJob) -> None:
    """Not by process group: torchrun starts each rank in a session of its own, which that would not reach."""
    if job.poll() is None:
        found = psutil.Process(job.pid)
        found.suspend()  # so that it does not end meanwhile and leave its ranks without a parent to find them by
        for process in (*found.children(recursive=True), found):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        job.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-TAIL:]
