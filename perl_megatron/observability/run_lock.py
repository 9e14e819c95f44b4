"""Who writes a run's folder: one job at a time, by a lock that goes with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from perl_megatron.errors import UserError
from perl_megatron.observability.full_disk import FullDisk

logger = logging.getLogger(__name__)

WAIT_SECONDS = 120.0
"""A machine that was lost keeps its locks on a shared file system for so long, and processes take a while to end."""
POLL_SECONDS = 0.5


class RunLock:
    """A POSIX lock of a file: on file systems that machines share it counts on all of them, and children that were
    forked do not have it. It would be given back where this process opens and closes the file once more.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, seconds: float = WAIT_SECONDS) -> None:
        """Have it, now or within so many seconds; UserError, which says who has it, where not. Again: no effect."""
        if self._descriptor is not None:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        until, has_told = time.monotonic() + seconds, False
        while not _try(descriptor, self._path):
            holder = (
                os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "its disk has no room for the name"
            )
            if time.monotonic() >= until:
                os.close(descriptor)
                raise UserError(
                    f"another job trains this run: {holder}",
                    where=str(self._path),
                    fix="end that job, or wait for its end",
                )
            if not has_told:
                logger.warning("waiting up to %.0f s for another job of this run to end: %s", seconds, holder)
                has_told = True
            time.sleep(POLL_SECONDS)
        self._descriptor = descriptor
        with FullDisk(logger.warning).tolerated("the name of the process in the run's lock"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _try(descriptor: int, path: Path) -> bool:
    """Whether nobody else has the lock; then this process does. A file system without locks is told of, no more."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        logger.warning("two jobs at a time in this run's folder would not be noticed: %s: %s", path, error.strerror)
    return True
