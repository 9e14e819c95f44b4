"""torchrun with ranks that have torch, transformers and megatron-core already.

To import them takes each process ten seconds of a core, which most ranks of the tests need for nothing else. Here one
process imports them (``warm_libraries.py``), and every launch is a fork of it: torchrun itself, whose ranks are forks
again (its `--start-method=fork --run-path`). On a machine with CUDA nothing may be forked that has looked for devices.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch


def can_fork() -> bool:
    """Whether ranks on this machine may be forked."""
    return not torch.cuda.is_available()


class WarmJob:
    """A launch, with what the tests ask of ``subprocess.Popen``."""

    def __init__(
        self, worker: Path, arguments: Sequence[str], processes: int, environment: Mapping[str, str], log: Path
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["warm_libraries"])
        with mock.patch.dict(os.environ, environment):  # of the process that all are forked from: it reads some now
            self._process = context.Process(target=_launch, args=(worker, arguments, processes, dict(environment), log))
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; ``subprocess.TimeoutExpired`` where it still runs after ``timeout`` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("torchrun", timeout or 0)
        return self._process.exitcode


def _launch(worker: Path, arguments: Sequence[str], processes: int, environment: dict[str, str], log: Path) -> None:
    """Be torchrun; one process runs without it."""
    assert "warm_libraries" in sys.modules, (
        "the libraries could not be imported before (python -c 'import warm_libraries')"
    )
    with log.open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(worker.parent))
    from torch.distributed import run

    if processes == 1:
        run.run_script_path(str(worker), *arguments)
        return
    options = ["--standalone", f"--nproc-per-node={processes}", "--start-method=fork", "--run-path"]
    run.main([*options, str(worker), *arguments])
