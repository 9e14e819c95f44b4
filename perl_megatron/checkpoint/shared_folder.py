"""A folder that several nodes share: a file that one of them has written may be seen late by the others."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SIGHT_SECONDS = 75.0
"""How long a file may not be seen: NFS believes what it knows of a folder for up to 60 s, as it is usually mounted."""
_POLL_SECONDS = 0.25


def unseen(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """A file that this process does not see with its size (bytes), after a while of waiting; None where it sees all."""
    end = time.monotonic() + SIGHT_SECONDS
    missing = list(sizes)
    while missing := [name for name in missing if _size(folder / name) != sizes[name]]:
        if time.monotonic() > end:
            return missing[0]
        time.sleep(_POLL_SECONDS)
        with suppress(OSError):
            os.listdir(folder)  # opening a folder makes a network file system ask its server again
    return None


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
