"""Ranks that are forked from one warm process: a job that is killed and resumed dozens of times starts in a second.

The parent has imported everything, and has neither threads nor process groups. Each rank goes through the command
line's own entry, as one that torchrun started. What a rank is at shows on a board in shared memory, so that it can be
killed there; the notes are taken from outside of the product, by wrapping two of its methods in the forked process.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import warm_libraries  # noqa: F401

from perl_megatron import cli
from perl_megatron.checkpoint.background import BackgroundWriter
from perl_megatron.launch.ports import free_port
from perl_megatron.observability.phases import Phases

PHASES = ("evaluate", "sync", "generate", "log_probs", "update", "save", "export")
WRITING = 32
"""Places from here on say which ranks write a checkpoint in the background."""


class WarmRanks:
    """One attempt at a job.

    Args:
        argv: of `perl-megatron`.
        num_ranks: 1 to 16.
        log: output of all ranks is added to it.
        prepare: called in each new process before it starts, with its rank.
    """

    def __init__(
        self, argv: list[str], *, num_ranks: int, log: Path, prepare: Callable[[int], None] = lambda rank: None
    ):
        self._board = mmap.mmap(-1, 2 * WRITING)
        self.statuses: dict[int, int] = {}
        port = free_port()
        self.pids = [self._fork(rank, argv, num_ranks, port, log, prepare) for rank in range(num_ranks)]

    def phase(self, rank: int = 0) -> str | None:
        """Which phase a rank is in."""
        place = self._board[rank]
        return PHASES[place - 1] if place else None

    def writes(self, rank: int = 0) -> bool:
        """Whether a rank writes a checkpoint in the background."""
        return bool(self._board[WRITING + rank])

    def running(self) -> bool:
        """Whether a rank has not ended yet; keeps the statuses of those that have."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) < len(self.pids)

    def wait(self, seconds: float) -> list[int]:
        """The exit statuses of all ranks; they are killed where they take longer."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"ranks {sorted(set(range(len(self.pids))) - self.statuses.keys())} did not end")
            time.sleep(0.01)
        return [self.statuses[rank] for rank in range(len(self.pids))]

    def kill(self, first: int | None = None, pause: float = 0.0) -> None:
        """SIGKILL to all ranks, to ``first`` a little before the others."""
        order = sorted(range(len(self.pids)), key=lambda rank: rank != first)
        for rank in order:
            if rank not in self.statuses:
                os.kill(self.pids[rank], signal.SIGKILL)
            if rank == first:
                time.sleep(pause)
        for rank in order:
            if rank not in self.statuses:
                self.statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(self.pids[rank], 0)[1])

    def _fork(self, rank: int, argv: list[str], num_ranks: int, port: int, log: Path, prepare: Any) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num_ranks),
                LOCAL_WORLD_SIZE=str(num_ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            self._take_notes(rank)
            prepare(rank)
            status = cli.main(argv)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _take_notes(self, rank: int) -> None:
        board, enter, write = self._board, Phases.__call__, BackgroundWriter._run

        @contextmanager
        def noted(phases: Phases, name: str, **facts: Any) -> Iterator[None]:
            before, board[rank] = board[rank], PHASES.index(name) + 1 if name in PHASES else 0
            try:
                with enter(phases, name, **facts):
                    yield
            finally:
                board[rank] = before

        def noted_write(writer: BackgroundWriter, write_all: Any) -> None:
            board[WRITING + rank] = 1
            try:
                write(writer, write_all)
            finally:
                board[WRITING + rank] = 0

        Phases.__call__ = noted  # type: ignore[method-assign]
        BackgroundWriter._run = noted_write  # type: ignore[method-assign]
