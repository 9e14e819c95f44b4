"""Checkpoints that are written while training goes on: one at a time, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from perl_megatron.errors import UserError
from perl_megatron.runtime import collective

logger = logging.getLogger(__name__)

END_SECONDS = 20.0
"""What a write may still take where the run ends by an error: the other ranks may be gone, and it would not end."""


class BackgroundWriter:
    """Runs one write at a time; all ranks call every method together.

    Args:
        asynchronous: whether in a thread; if not, ``start`` returns when all is written.
        timeout_seconds: of the collectives of a write.
    """

    def __init__(self, *, asynchronous: bool, timeout_seconds: float):
        self._asynchronous = asynchronous
        # The thread's agreements must not meet those of the trainer.
        self._group = collective.new_group(timeout_seconds) if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._took: dict[str, float] = {}

    def start(self, write: Callable[[], Path]) -> None:
        """Begin a write; ``wait`` says how it ended, and comes before the next ``start``."""
        assert self._thread is None, "one checkpoint at a time"
        assert self._error is None, "the outcome of the last write was not asked for"
        if not self._asynchronous:
            self._run(write)
            return
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether this rank is writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until the last write has ended. Raises what it met, once: a UserError on all ranks."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take_times(self) -> dict[str, float]:
        """What the last write took, once: metrics of a step; empty until it has ended."""
        took, self._took = self._took, {}
        return took

    def close(self) -> None:
        """Give a write that nobody waited for a little time to end."""
        if self._thread is not None:
            self._thread.join(END_SECONDS)

    def _run(self, write: Callable[[], Path]) -> None:
        start, processor_start = time.monotonic(), time.thread_time()
        try:
            with collective.over(self._group):
                write()
            if self._asynchronous:
                self._took = {
                    "save/background_seconds": time.monotonic() - start,
                    "save/background_cpu_seconds": time.thread_time() - processor_start,
                }
        except BaseException as error:
            self._error = error
            if not isinstance(error, UserError):  # the run may end otherwise before anyone waits for the outcome
                logger.exception("Writing a checkpoint failed on rank %d", collective.rank())
            elif collective.rank() == 0:
                logger.error("A checkpoint failed; earlier ones are as they were:\n%s", error)
