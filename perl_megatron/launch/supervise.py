"""Watch torchrun and its ranks: show rank 0, pass signals on once, and end whatever is left."""

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
from typing import TextIO

import psutil

POLL_SECONDS = 0.2
SCAN_SECONDS = 1.0
"""How often the tree of processes is read, so that none is forgotten when its parent dies."""
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a new child on Linux: get SIGTERM when the parent dies, even if by SIGKILL."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


class Supervisor:
    """Waits for a torchrun process (the agent).

    Args:
        agent: torchrun; the ranks are its children.
        rank_zero_logs: torchrun's `--log-dir`, where rank 0's output appears.
        on_tick: called at every poll.
    """

    def __init__(self, agent: subprocess.Popen[bytes], *, rank_zero_logs: Path, on_tick: Callable[[], None]):
        self.ended_at_once = False
        self.asked_to_stop = False
        self._agent, self._on_tick = agent, on_tick
        self._tails = [
            _Tail(rank_zero_logs, "*/attempt_0/0/stdout.log", sys.stdout),
            _Tail(rank_zero_logs, "*/attempt_0/0/stderr.log", sys.stderr),
        ]
        self._signals = 0
        self._known: set[psutil.Process] = set()
        self._next_scan = 0.0

    def wait(self) -> int:
        """Until the agent has ended and nothing that it started is left; returns its exit code."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
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
        for tail in self._tails:
            tail.forward()
        if time.monotonic() >= self._next_scan:
            self._next_scan = time.monotonic() + SCAN_SECONDS
            self._known.update(_descendants(self._agent.pid))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self.asked_to_stop = True
        ranks = _descendants(self._agent.pid, recursive=False)
        if self._signals == 1 and ranks:
            print("stopping after this step; once more to end at once", file=sys.stderr, flush=True)
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)
        else:
            self.ended_at_once = True
            self._kill_all()

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

    def __init__(self, directory: Path, pattern: str, console: TextIO):
        self._directory, self._pattern, self._console = directory, pattern, console
        self._path: Path | None = None
        self._offset = 0

    def forward(self) -> None:
        self._path = self._path or next(iter(self._directory.glob(self._pattern)), None)
        if self._path is None:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        # Whole lines only, so that no character is cut in two.
        end = new.rfind(b"\n") + 1
        if end:
            self._console.write(new[:end].decode("utf-8", errors="replace"))
            self._console.flush()
            self._offset += end
