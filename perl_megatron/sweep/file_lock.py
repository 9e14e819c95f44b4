"""A lock that the kernel releases when its last holder ends, however that is."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from perl_megatron.errors import UserError

POLL_SECONDS = 0.5


class FileLock:
    """flock(2) of a file.

    The lock belongs to the opened file, not to a process. A forked child has that too, and so has a program that is
    given ``descriptor`` when it is started (``pass_fds``); either holds the lock, also when this process is gone.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def try_acquire(self) -> bool:
        """Whether nobody else holds it; then this object does. UserError where the file system has no locks."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            fix = "put sweep.directory on a file system that has locks (Lustre: mount it with `flock`)"
            raise UserError(f"the file cannot be locked: {error.strerror}", where=str(self.path), fix=fix) from error
        return True

    def acquire(self, on_wait: Callable[[], None]) -> None:
        """Wait for it. ``on_wait`` is called again and again meanwhile, and may raise."""
        while not self.try_acquire():
            on_wait()
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Let others have it at once, also where children have inherited it: they do not hold it any more."""
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file. A child that inherited the lock holds it until it ends."""
        os.close(self.descriptor)
