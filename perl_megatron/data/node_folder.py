"""A folder that the processes of one run share on a node: in memory where there is room, and gone when the run is.

    /dev/shm/perl_megatron-1000/3f0c9a12be44          the folder of a run
    /dev/shm/perl_megatron-1000/3f0c9a12be44.lock     held (flock) by each of its processes

The system releases the lock of a process that ends, however it ends. So a lock that nobody holds belongs to a dead run:
the last process of a run removes the folder, and where all were killed, whoever makes the next one does.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
import uuid
import weakref
from pathlib import Path

from perl_megatron.data.pixel_store import PixelStore
from perl_megatron.runtime import collective

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
TAKEN_SHARE = 0.5
"""At most so much of what is free is taken: others need shared memory too (NCCL, data loaders)."""

Offer = tuple[Path, int]
"""Where runs may have their folders, and how many bytes a run may keep there."""


class NodeFolder:
    """Keeps the folder of ``run`` in ``place`` for as long as a process of the run lives. Raises OSError."""

    def __init__(self, place: Path, run: str):
        self.path = place / run
        self._lock_path = place / f"{run}.lock"
        self._process = os.getpid()
        self._lock = _hold(self._lock_path)
        self.path.mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Leave; the last process removes the folder."""
        if self._lock < 0 or os.getpid() != self._process:  # a forked process must not let go of its parent's lock
            return
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # also for processes that were forked and live on
        os.close(self._lock)
        self._lock = -1
        _remove_if_dead(self._lock_path)


def node_pixels(max_bytes: int) -> PixelStore:
    """The pixels that this node's processes of the run share, up to ``max_bytes``. Collective."""
    host = socket.gethostname()
    offers = collective.gather_objects((host, uuid.uuid4().hex[:12], _best_place(max_bytes)))
    return _open(next(offer for name, _, offer in offers if name == host), run=offers[0][1], max_bytes=max_bytes)


def own_pixels(max_bytes: int) -> PixelStore:
    """As ``node_pixels``, for this process (and those that it starts) alone; not collective."""
    return _open(_best_place(max_bytes), run=uuid.uuid4().hex[:12], max_bytes=max_bytes)


def _open(offer: Offer | None, *, run: str, max_bytes: int) -> PixelStore:
    if offer is not None:
        place, max_bytes = offer
        try:
            folder = NodeFolder(place, run)
            store = PixelStore(folder.path, max_bytes)
            weakref.finalize(store, folder.close)
            return store
        except OSError as error:
            logger.warning("%s cannot be used (%s): each process keeps its own pixels", place, error.strerror)
    return PixelStore(None, max_bytes)


def _best_place(max_bytes: int) -> Offer | None:
    """Shared memory, or the temporary folder where that has too little room; None where neither can be written."""
    offers: list[Offer] = []
    name = f"perl_megatron-{os.getuid()}"
    # A temporary folder may be on a network, where pixels that another node drops would end their readers here.
    for place in (SHARED_MEMORY / name, Path(tempfile.gettempdir()) / f"{name}-{socket.gethostname()}"):
        try:
            _claim(place)
            for lock_path in place.glob("*.lock"):
                _remove_if_dead(lock_path)
            free = shutil.disk_usage(place).free
        except OSError as error:
            logger.debug("%s cannot be used: %s", place, error)
            continue
        if TAKEN_SHARE * free >= max_bytes:
            return place, max_bytes
        offers.append((place, int(TAKEN_SHARE * free)))
    if not offers:
        logger.warning(
            "neither %s nor %s can be written: each process keeps its own pixels", SHARED_MEMORY, tempfile.gettempdir()
        )
        return None
    place, num_bytes = max(offers, key=lambda offer: offer[1])
    logger.warning(
        "data.pixel_cache_mib = %d is more than half of what is free in %s: up to %d MiB of pixels are kept",
        max_bytes // 2**20, place.parent, num_bytes // 2**20,
    )  # fmt: skip
    return place, num_bytes


def _claim(place: Path) -> None:
    """Make the folder, for this user alone; PermissionError where it is someone else's, or a link."""
    place.mkdir(mode=0o700, exist_ok=True)
    status = place.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{place} is not a folder of this user alone")


def _hold(lock_path: Path) -> int:
    """File descriptor of the lock file, which others cannot hold alone from now on."""
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError:
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor
        os.close(descriptor)  # someone removed it just before it was held


def _remove_if_dead(lock_path: Path) -> None:
    """Remove the folder of a run that has no process any more."""
    try:
        descriptor = os.open(lock_path, os.O_RDWR)
    except OSError:
        return  # removed by another process
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink > 0:  # else another process was faster, and the name may be in use again
            shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
            lock_path.unlink(missing_ok=True)
    except OSError:
        pass  # its run lives
    finally:
        os.close(descriptor)
