"""Decoded images that all processes of a run on a node share: one file each in a common folder, which readers map.

    FOLDER/pixels/KEY.pixels     height and width (int64), then uint8 [height, width, 3]; KEY is the hash of the pixels
    FOLDER/sources/NAME          symbolic link: which pixels an image file has (``NAME`` stands for its path and state)
    FOLDER/locks/…               who decodes, and the bytes of all pixels

A file appears under its name whole or not at all. Nothing depends on a process to go on: locks end with their holder,
and what a killed process leaves is dropped like anything that nobody uses. (`multiprocessing.shared_memory` has no
names for contents, no bound, and a tracker in each process that removes what the others still use. Files of NumPy's own
format have a header that `ast` reads, which fails now and then where threads do so at once: CPython's gh-106905.)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from perl_megatron.data.cache import ByteBoundedCache

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096
KEPT_SHARE = 0.875
"""Of the bound: what remains when pixels are dropped, so that it is not done for every new image."""
OWN_BYTES = 512 * 2**20
HEADER_BYTES = 16
SUFFIX, TEMPORARY = ".pixels", ".tmp"
NUM_LOCKS = 64
LOCK_SECONDS = 60.0
"""Whoever waits longer for another process goes on without it: it may have been stopped."""
FIRST_POLL_SECONDS, MAX_POLL_SECONDS = 0.0005, 0.02


class StoredImage(NamedTuple):
    """The pixels of an image."""

    key: str
    """Its content hash."""
    pixels: np.ndarray
    """uint8 [height, width, 3], not to be written to; memory-mapped where it is shared."""
    is_shared: bool
    """Whether the node's other processes find it too."""


class PixelStore:
    """Pixels by content hash and by image file; for any number of processes and threads.

    Those used last are kept, up to ``max_bytes`` of all processes together (and the few that are being written). Where
    they cannot be written (no room, say), a warning is logged once, and each process keeps its own in memory.

    Args:
        folder: exists, and is shared by the processes; None: nothing is shared.
        max_bytes: the same number in all processes.
        restore: makes ``folder`` anew, where someone removed it; may raise OSError.
        is_helper: this process works for one that has the store too. It makes no folders (nobody would remove them),
            keeps nothing by itself and warns of nothing: what it cannot share, the other process has to keep.
    """

    def __init__(
        self,
        folder: Path | None,
        max_bytes: int,
        *,
        restore: Callable[[], None] | None = None,
        is_helper: bool = False,
    ):
        self._folder, self.max_bytes = folder, max_bytes
        self._restore, self._is_helper = restore, is_helper
        self._own_bytes = 0 if is_helper else min(max_bytes, OWN_BYTES)
        self._own: ByteBoundedCache[np.ndarray] = ByteBoundedCache(self._own_bytes)
        self._own_keys: ByteBoundedCache[str] = ByteBoundedCache(self._own_bytes // 8)
        self._has_warned = False
        if folder is not None:
            self._pixels, self._sources, self._locks = (folder / name for name in ("pixels", "sources", "locks"))
            if not is_helper:
                self._make_folders()

    def __reduce__(self) -> tuple[Callable[..., PixelStore], tuple[Path | None, int]]:
        """A process that works for this one opens the same folder."""
        return partial(PixelStore, is_helper=True), (self._folder, self.max_bytes)

    def holds(self, key: str) -> bool:
        """Whether the pixels with this content hash are kept; if so, they count as used now."""
        return self._use(key) is not None or self._own.get(key) is not None

    def get(self, key: str) -> StoredImage | None:
        """The pixels with this content hash, which count as used now; None if they are not kept."""
        pixels = self._map(key)
        if pixels is not None:
            return StoredImage(key, pixels, is_shared=True)
        pixels = self._own.get(key)
        return None if pixels is None else StoredImage(key, pixels, is_shared=False)

    def of_source(self, source: str) -> StoredImage | None:
        """The pixels of the image file that ``source`` stands for (a file name); None if they are not kept."""
        key = self._own_keys.get(source)
        if key is None and self._folder is not None:
            with contextlib.suppress(OSError):
                key = os.readlink(self._sources / source)
        return None if key is None else self.get(key)

    def put(self, key: str, pixels: np.ndarray, *, source: str) -> StoredImage:
        """Keep an image's pixels; returns them as other processes see them, or as they were given."""
        num_bytes = _round_up(HEADER_BYTES + pixels.nbytes)
        if self._folder is not None and num_bytes <= self.max_bytes:
            try:
                self._share(key, pixels, num_bytes, source)
                shared = self._map(key)
                if shared is not None:
                    return StoredImage(key, shared, is_shared=True)
            except OSError as error:
                self._warn(error)
        self._own.put(key, pixels, num_bytes=pixels.nbytes)
        self._own_keys.put(source, key, num_bytes=300)
        return StoredImage(key, pixels, is_shared=False)

    @contextlib.contextmanager
    def alone(self, source: str) -> Iterator[None]:
        """Within the block no other process or thread is in such a block for ``source`` (nor for a few others).

        Nobody is kept waiting for ever: see ``LOCK_SECONDS``.
        """
        with contextlib.ExitStack() as stack:
            if self._folder is not None:
                with contextlib.suppress(OSError):
                    stack.enter_context(self._locked(f"{zlib.crc32(source.encode()) % NUM_LOCKS:02d}"))
            yield

    @property
    def num_bytes(self) -> int:
        """Bytes of all shared pixels; takes a look at every file."""
        return 0 if self._folder is None else sum(size for _, size, _ in self._files())

    def _map(self, key: str) -> np.ndarray | None:
        path = self._use(key)
        if path is not None:
            with contextlib.suppress(OSError):  # dropped in this moment
                content = np.memmap(path, np.uint8, mode="r")
                height, width = content[:HEADER_BYTES].view(np.int64)
                return content[HEADER_BYTES:].reshape(height, width, 3)
        return None

    def _use(self, key: str) -> Path | None:
        """The file of the pixels, which are used now."""
        if self._folder is None:
            return None
        path, now = self._pixels / f"{key}{SUFFIX}", time.time_ns()
        try:
            os.utime(path, ns=(now, now))  # a file system's own clock gives many uses one time
        except OSError:
            return None
        return path

    def _make_folders(self) -> None:
        for path in (self._pixels, self._sources, self._locks):
            path.mkdir(exist_ok=True)

    def _share(self, key: str, pixels: np.ndarray, num_bytes: int, source: str) -> None:
        """Write the pixels and whose they are, in new folders if need be; raises OSError."""
        try:
            self._write(key, pixels, num_bytes, source)
        except FileNotFoundError:
            if self._is_helper:
                raise
            if self._restore is not None:
                self._restore()
            self._make_folders()
            self._write(key, pixels, num_bytes, source)

    def _write(self, key: str, pixels: np.ndarray, num_bytes: int, source: str) -> None:
        """Write both files, if they are not there; raises OSError."""
        self._write_pixels(key, pixels, num_bytes)
        with contextlib.suppress(FileExistsError):
            (self._sources / source).symlink_to(key)

    def _write_pixels(self, key: str, pixels: np.ndarray, num_bytes: int) -> None:
        """Write their file, if it is not there; raises OSError."""
        path = self._pixels / f"{key}{SUFFIX}"
        if path.exists():
            return
        self._make_room(num_bytes)
        try:
            _write_whole(path, pixels)
        except OSError:  # others use the room, too
            self._make_room(num_bytes, kept_share=0.5)
            _write_whole(path, pixels)

    def _make_room(self, num_bytes: int, *, kept_share: float | None = None) -> None:
        """Count ``num_bytes`` more; beyond the bound (or with ``kept_share``) drop the least recently used pixels."""
        with self._locked("bytes") as counter:
            text = os.pread(counter, 32, 0)
            total = int(text) if text else self.num_bytes  # the file is new: maybe only it was removed
            if total + num_bytes > self.max_bytes or kept_share is not None:
                kept_share = KEPT_SHARE if kept_share is None else kept_share
                total = self._drop_to(int(min(self.max_bytes, total) * kept_share) - num_bytes)
            os.pwrite(counter, b"%-32d" % (total + num_bytes), 0)

    def _drop_to(self, num_bytes: int) -> int:
        """Drop the pixels used longest ago until ``num_bytes`` are left; returns what is left."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        being_written = time.time_ns() - int(LOCK_SECONDS * 1e9)
        dropped: set[str] = set()
        for used_ns, size, path in files:
            if total <= num_bytes:
                break
            if path.suffix == TEMPORARY and used_ns > being_written:
                continue
            path.unlink(missing_ok=True)
            dropped.add(path.stem)
            total -= size
        for link in self._sources.iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link) in dropped:
                    link.unlink()
        return total

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of the last use in ns, bytes, path) of all pixels."""
        files = []
        with os.scandir(self._pixels) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    files.append((status.st_mtime_ns, _round_up(status.st_size), Path(entry.path)))
        return files

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """Hold a lock file, unless that takes too long; its descriptor."""
        descriptor = os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _wait_for(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned and not self._is_helper:
            self._has_warned = True
            logger.warning(
                "pixels cannot be shared in %s (%s): this process keeps its own, up to %d MiB",
                self._folder, error.strerror or error, self._own_bytes // 2**20,
            )  # fmt: skip


def _write_whole(path: Path, pixels: np.ndarray) -> None:
    temporary = path.with_name(f"{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(np.array(pixels.shape[:2], np.int64).tobytes())
            file.write(pixels.tobytes())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _wait_for(descriptor: int) -> None:
    deadline, seconds = time.monotonic() + LOCK_SECONDS, FIRST_POLL_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(seconds)
            seconds = min(2 * seconds, MAX_POLL_SECONDS)


def _round_up(num_bytes: int) -> int:
    """To whole pages, as memory is given."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
