"""A real file system that is soon full (tmpfs), for tests of what runs do then."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096


@contextmanager
def small_disk(folder: Path, *, num_kib: int) -> Iterator[Path]:
    """A file system of this size at ``folder``, which is made; the test is skipped where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", str(folder)]
    try:
        result = subprocess.run(mount, capture_output=True, text=True, check=False)
        reason = result.stderr.strip()
    except FileNotFoundError:
        result, reason = None, "there is no mount here"
    if result is None or result.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted: {reason}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Ballast:
    """A file that takes all the space of a disk, as another program might."""

    def __init__(self, disk: Path):
        self._path = disk / "ballast"

    def fill(self) -> None:
        """Until not a page is left."""
        with self._path.open("ab", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(PAGE))
                except OSError:
                    return

    def free(self, num_bytes: int | None = None) -> None:
        """Give up so many bytes, or all."""
        if num_bytes is None:
            self._path.unlink()
        else:
            os.truncate(self._path, max(0, self._path.stat().st_size - num_bytes))
