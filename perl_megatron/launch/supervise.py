"""Watch torchrun and its ranks: show the first one, pass signals on once, and end whatever is left."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal

import psutil

from perl_megatron.launch.agent import DEAF_TO, PARENT_DIED
from perl_megatron.launch.console import say, show

POLL_SECONDS = 0.2
SCAN_SECONDS = 1.0
"""How often the tree of processes is read, so that none is forgotten when its parent dies."""
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a new child on Linux: get a signal that ends it when the parent dies, even if by SIGKILL."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(PARENT_DIED))


class Supervisor:
    """Waits for a torchrun process (the agent).

    Args:
        agent: torchrun; the ranks are its children.
        first_rank_logs: torchrun's `--log-dir`, where the output of this machine's first rank appears.
        on_tick: called at every poll.
    """

    def __init__(self, agent: subprocess.Popen[bytes], *, first_rank_logs: Path, on_tick: Callable[[], None]):
        self.ended_at_once = False
        self.asked_by: signal.Signals | None = None
        """The first signal that asked the ranks to stop."""
        self._agent, self._on_tick = agent, on_tick
        self._tails = [
            _Tail(first_rank_logs, "*/attempt_0/0/stdout.log", "stdout"),
            _Tail(first_rank_logs, "*/attempt_0/0/stderr.log", "stderr"),
        ]
        self._stop_file: Path | None = None
        self._known: set[psutil.Process] = set()
        self._next_scan = 0.0

    def watch_for(self, stop_file: Path) -> None:
        """Take the appearance of a file for SIGUSR1."""
        self._stop_file = stop_file

    def wait(self) -> int:
        """Until the agent has ended and nothing that it started is left; returns its exit code."""
        previous = {number: signal.signal(number, self._on_signal) for number in DEAF_TO}
        try:
            while self._agent.poll() is None:
                self._tick()
                time.sleep(POLL_SECONDS)
        finally:
            self._kill_all()
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._tick()
        return self._agent.returncode

    def _tick(self) -> None:
        self._on_tick()
        if self._stop_file is not None and self.asked_by is None and self._stop_file.exists():
            self.ask_to_stop(signal.SIGUSR1)
        for tail in self._tails:
            tail.forward()
        if time.monotonic() >= self._next_scan:
            self._next_scan = time.monotonic() + SCAN_SECONDS
            self._known.update(_descendants(self._agent.pid))

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Pass a signal on to the ranks, once. A second Ctrl-C ends all at once, as does any signal before there are
        ranks; a second one of another kind says nothing new.
        """
        ranks, is_first = _descendants(self._agent.pid, recursive=False), self.asked_by is None
        self.asked_by = self.asked_by or number
        if is_first and ranks:
            more = "; once more to end at once" if number == signal.SIGINT else f" ({number.name})"
            say(f"stopping after this step{more}")
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)
        elif is_first or number == signal.SIGINT:
            self.ended_at_once = True
            self._kill_all()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask_to_stop(signal.Signals(number))

    def _kill_all(self) -> None:
        """SIGKILL for the agent and all that was ever seen below it."""
        self._known.update(_descendants(self._agent.pid))
        for process in list(self._known):
            self._known.update(_descendants(process.pid) if process.is_running() else ())
        if self._agent.poll() is None:
            self._agent.kill()
            self._agent.wait()
        for process in list(self._known):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(self._known), timeout=10)


def _descendants(pid: int, *, recursive: bool = True) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=recursive)
    return []


class _Tail:
    """Copies what is new in a log file to the console."""

    def __init__(self, directory: Path, pattern: str, stream: Literal["stdout", "stderr"]):
        self._directory, self._pattern, self._stream = directory, pattern, stream
        self._path: Path | None = None
        self._offset = 0
        self._earlier = set(directory.glob(pattern))  # of another launch that kept its logs here

    def forward(self) -> None:
        self._path = self._path or next(iter(set(self._directory.glob(self._pattern)) - self._earlier), None)
        if self._path is None:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        # Whole lines only, so that no character is cut in two.
        end = new.rfind(b"\n") + 1
        if end:
            self._offset += end
            show(new[:end].decode("utf-8", errors="replace"), self._stream)
