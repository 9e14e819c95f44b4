"""A file that grows by whole records: one that a full disk has no room for waits, and leaves no part of itself."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from perl_megatron.observability.full_disk import FullDisk

MAX_WAITING_BYTES = 64 * 2**20
"""Of each file; beyond, the oldest records are given up, but for those that nobody counts: a file's beginning."""


class AppendFile:
    """Appends records, each with one call of the system; only one process has the file open to write.

    While the disk is full, they wait in memory and are written, in order, before the next one that there is room for.

    Args:
        path: made where it is not there.
        disk: is told where the disk is full, and how many records are missing in the end.
        what: a record is called there.
    """

    def __init__(self, path: Path, disk: FullDisk, *, what: str):
        self._file = path.open("ab", buffering=0)
        self._disk, self._what = disk, what
        self._waiting: deque[tuple[bytes, int]] = deque()

    def append(self, content: bytes, *, count: int = 1) -> None:
        """Add ``count`` records that belong together. Raises OSError where writing fails, but for a full disk."""
        self._waiting.append((content, count))
        self._write_waiting()
        while sum(len(waiting) for waiting, _ in self._waiting) > MAX_WAITING_BYTES:
            self._give_up()

    def sync(self) -> None:
        """Wait for the disk. What there is no room for still waits; OSError for other failures."""
        self._write_waiting()
        with self._disk.tolerated(self._what, count=0):  # network file systems may find only now that there is no room
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what waits if there is room now, and close the file."""
        self._write_waiting()
        while self._waiting:
            self._give_up()
        with self._disk.tolerated(self._what, count=0):  # it is closed all the same
            self._file.close()

    def _give_up(self) -> None:
        oldest = next((place for place, (_, count) in enumerate(self._waiting) if count), 0)
        self._disk.missing[self._what] += self._waiting[oldest][1]
        del self._waiting[oldest]

    def _write_waiting(self) -> None:
        with self._disk.tolerated(self._what, count=0):  # what is not written still waits
            while self._waiting:
                self._write_whole(self._waiting[0][0])
                self._waiting.popleft()

    def _write_whole(self, content: bytes) -> None:
        end, remaining = os.fstat(self._file.fileno()).st_size, memoryview(content)
        try:
            while remaining:  # a disk that is almost full takes the first part
                remaining = remaining[self._file.write(remaining) :]
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise
