"""What a power failure would take of the files that get their name while one watches: what nobody waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


class Disk:
    """Files as they were when they were last waited for, and folders whose names have changed since."""

    def __init__(self) -> None:
        self._safe: dict[int, tuple[int, int]] = {}
        self._lost: list[str] = []
        self._folders: dict[int, str] = {}

    def lost(self) -> list[str]:
        """Files that had a name before they were on the disk, and folders with a name that is not there yet."""
        return [*self._lost, *self._folders.values()]

    def synced(self, stat: os.stat_result) -> None:
        """A file or folder was waited for."""
        self._safe[stat.st_ino] = stat.st_size, stat.st_mtime_ns
        self._folders.pop(stat.st_ino, None)

    def renamed(self, old: Path, new: Path) -> None:
        """A file or folder is about to get a name."""
        for file in [old, *old.rglob("*")]:
            stat = file.stat()
            if file.is_file() and self._safe.get(stat.st_ino) != (stat.st_size, stat.st_mtime_ns):
                self._lost.append(str(file))
        self._folders[new.parent.stat().st_ino] = str(new.parent)


@contextmanager
def watched_disk() -> Iterator[Disk]:
    """Every `fsync` and every rename of this process within the block."""
    disk, real_sync = Disk(), os.fsync

    def sync(descriptor: Any) -> None:
        real_sync(descriptor)
        disk.synced(os.fstat(descriptor))

    def noted(real: Any) -> Any:
        def rename(old: Any, new: Any, **options: Any) -> None:
            disk.renamed(Path(old), Path(new))
            real(old, new, **options)

        return rename

    with (
        mock.patch.object(os, "fsync", sync),
        mock.patch.object(os, "replace", noted(os.replace)),
        mock.patch.object(os, "rename", noted(os.rename)),
    ):
        yield disk
