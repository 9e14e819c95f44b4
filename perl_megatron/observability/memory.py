"""Peak resident memory of a process and everything it started, sampled in the background."""

from __future__ import annotations

import contextlib
import threading
import time

import psutil

GIB = 2**30
SHARE = 0.01
"""Of one core's time, at most, that sampling takes: the system goes over every page of every process for it, which
takes seconds where a node's ranks have hundreds of GiB."""


def tree_rss_gib(root_pid: int | None = None) -> float:
    """Resident memory of the process (None: this one) and all its descendants, summed, in GiB.

    A page that several processes share counts once where the system tells (Linux): a checkpoint's forked writers share
    all of a rank's memory. Elsewhere it counts once for each, which errs on the high side.
    """
    try:
        root = psutil.Process(root_pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    return total / GIB


class PeakMemory:
    """Samples `tree_rss_gib` from construction to `close`: every `interval` seconds, or as seldom as `SHARE` asks for.

    Args:
        root_pid: the process at the top; None: this one. The launcher's pid gives all ranks of the machine together.
    """

    def __init__(self, root_pid: int | None = None, *, interval: float = 0.5):
        self._root_pid, self._interval = root_pid, interval
        self.start = time.monotonic()
        self._peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="peak-memory", daemon=True)
        self._thread.start()

    @property
    def gib(self) -> float:
        """The highest sum seen so far."""
        if not self._peak:
            self._sample()
        return self._peak

    def close(self) -> None:
        """End the sampling."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> float:
        """How many seconds of a core it took."""
        begin = time.thread_time()
        self._peak = max(self._peak, tree_rss_gib(self._root_pid))
        return time.thread_time() - begin

    def _sample_until_stopped(self) -> None:
        pause = self._interval
        while not self._stop.wait(pause):
            pause = max(self._interval, self._sample() / SHARE)
