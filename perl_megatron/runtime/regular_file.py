"""Files that others name are opened only if they are files: a pipe would never end, and a device never begin."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; what it is is asked of the opened one, so nothing can be put in its place.

    Raises OSError for what cannot be opened and for what is not a regular file (the latter without waiting, where it
    is a pipe), ValueError for a path that no file can have.
    """
    # Without O_NONBLOCK a named pipe's opening waits for a writer. On regular files it does nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file, but a pipe or a device", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes | None:
    """The content of a regular file; None where it has more than ``max_bytes``. Raises as ``open_regular`` does."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    return content if len(content) <= max_bytes else None
