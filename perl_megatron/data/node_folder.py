"""A folder that the processes of one run share on a node: in memory where there is room, and gone when the run is.

    /dev/shm/perl_megatron-1000/3f0c9a12be44          the folder of a run
    /dev/shm/perl_megatron-1000/3f0c9a12be44.lock     held (flock) by each of its processes

The system releases the lock of a process that ends, however it ends. So a lock that nobody holds belongs to a dead run:
the last process of a run removes the folder, and where it was killed, whoever makes the next one does. Where the folder
is removed under a living run (systemd-logind clears a user's shared memory at logout), its processes make it anew.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from perl_megatron.data.pixel_store import PixelStore
from perl_megatron.runtime import collective

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
TAKEN_SHARE = 0.5
"""At most so much of what is free is taken: others need shared memory too (NCCL, data loaders)."""


class Offer(NamedTuple):
    """Where a run may have its folder, as one process sees it."""

    place: Path | None
    """The folder of this user's runs; None: there is none that can be written."""
    max_bytes: int
    """What the run may keep there."""
    shortfall: str | None = None
    """Why that is not what was asked for; for the log."""


class NodeFolder:
    """Keeps the folder of ``run`` in ``place`` for as long as a process of the run lives. Raises OSError."""

    def __init__(self, place: Path, run: str):
        self.path = place / run
        self._lock_path = place / f"{run}.lock"
        self._process = os.getpid()
        self._changes = threading.Lock()
        self._lock = _hold(self._lock_path)
        self.path.mkdir(mode=0o700, exist_ok=True)

    def restore(self) -> None:
        """Make the folder anew where someone removed it, unless this process has left it. Raises OSError."""
        if os.getpid() != self._process:  # a forked one has no lock of its own
            return
        with self._changes:
            if self._lock < 0:
                return
            _claim(self.path.parent)
            if os.fstat(self._lock).st_nlink == 0:  # the file is gone too, and nobody else can see the lock
                lock, self._lock = self._lock, _hold(self._lock_path)
                os.close(lock)
            self.path.mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Leave; the last process removes the folder."""
        if os.getpid() != self._process:  # a forked process must not let go of its parent's lock
            return
        with self._changes:
            if self._lock < 0:
                return
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # also for processes that were forked and live on
            os.close(self._lock)
            self._lock = -1
        _remove_if_dead(self._lock_path)


def node_pixels(max_bytes: int) -> PixelStore:
    """The pixels that this node's processes of the run share, up to ``max_bytes``. Collective."""
    host, own_name = socket.gethostname(), uuid.uuid4().hex[:12]
    offers = collective.gather_objects((host, own_name, _best_place(max_bytes)))
    first_name, offer = next((name, offer) for its_host, name, offer in offers if its_host == host)
    if first_name == own_name:
        _warn_of_shortfall(offer)
    return _open(offer, run=offers[0][1])


def turn_on_node() -> tuple[int, int]:
    """This process's number of the run's on this node, and how many these are. Collective."""
    hosts = collective.gather_objects(socket.gethostname())
    own_host = hosts[collective.rank()]
    return hosts[: collective.rank()].count(own_host), hosts.count(own_host)


def own_pixels(max_bytes: int) -> PixelStore:
    """As ``node_pixels``, for this process (and those that it starts) alone; not collective."""
    offer = _best_place(max_bytes)
    _warn_of_shortfall(offer)
    return _open(offer, run=uuid.uuid4().hex[:12])


def _warn_of_shortfall(offer: Offer) -> None:
    if offer.shortfall is not None:
        logger.warning("%s", offer.shortfall)


def _open(offer: Offer, *, run: str) -> PixelStore:
    if offer.place is not None:
        try:
            folder = NodeFolder(offer.place, run)
            store = PixelStore(folder.path, offer.max_bytes, restore=folder.restore)
            weakref.finalize(store, folder.close)
            return store
        except OSError as error:
            reason = error.strerror or error
            logger.warning("%s cannot be used (%s): this process keeps its own pixels", offer.place, reason)
    return PixelStore(None, offer.max_bytes)


def _best_place(max_bytes: int) -> Offer:
    """Shared memory, or the temporary folder where that has too little room."""
    offers: list[tuple[int, Path]] = []
    obstacles: list[str] = []
    name = f"perl_megatron-{os.getuid()}"
    # A temporary folder may be on a network, where pixels that another node drops would end their readers here.
    parents: tuple[tuple[Callable[[], str | Path], str], ...] = (
        (lambda: SHARED_MEMORY, name),
        (tempfile.gettempdir, f"{name}-{socket.gethostname()}"),  # OSError where there is none
    )
    for find_parent, its_name in parents:
        try:
            place = Path(find_parent()) / its_name
            _claim(place)
            for lock_path in place.glob("*.lock"):
                _remove_if_dead(lock_path)
            free = shutil.disk_usage(place).free
        except OSError as error:
            logger.debug("no folder for pixels: %s", error)
            obstacles.append(str(error))
            continue
        if TAKEN_SHARE * free >= max_bytes:
            return Offer(place, max_bytes)
        offers.append((int(TAKEN_SHARE * free), place))
    if not offers:
        reasons = "; ".join(obstacles)
        return Offer(None, max_bytes, f"no folder for pixels ({reasons}): each process keeps its own pixels")
    num_bytes, place = max(offers, key=lambda offer: offer[0])
    return Offer(
        place,
        num_bytes,
        f"half of what is free in {place.parent} is less than {max_bytes // 2**20} MiB: up to {num_bytes // 2**20} MiB "
        "of pixels are kept there",
    )


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
    """Remove the folder of a run that has no process any more.

    Where that fails (a process that decodes ahead holds no lock, and may write a moment longer than its run lives), the
    lock file stays too, for the next one to find.
    """
    folder = lock_path.with_suffix("")
    try:
        descriptor = os.open(lock_path, os.O_RDWR)
    except OSError:
        return  # removed by another process
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink > 0:  # else another process was faster, and the name may be in use again
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                lock_path.unlink(missing_ok=True)
    except OSError:
        pass  # its run lives
    finally:
        os.close(descriptor)
