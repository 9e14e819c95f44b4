"""Images that other processes decode before they are needed."""

from __future__ import annotations

import atexit
import logging
import threading
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import NamedTuple

from perl_megatron.data.image_reader import ImageReader
from perl_megatron.data.pixel_store import StoredImage
from perl_megatron.data.worker_pool import WorkerDied, WorkerNotStarted, WorkerPool

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
OWN_IMAGES = 8
"""That each process decodes, on average, before it looks whether others are done with what comes between."""


class ImagesAhead:
    """``ImageReader.read`` with a head start: ``num_processes`` processes decode what is expected, in that order.

    They leave the pixels in the reader's store. Decoded images wait until they are taken, up to ``max_bytes`` and the
    few that were under way when it was reached; then nothing more is begun. For any number of threads. It is closed
    when this process ends, if not before.

    Args:
        reader: and its store.
        num_processes: that decode.
        max_bytes: of decoded images that wait.
        turn: this one's number of those of the node that expect the same images in one store, and how many these are.
            Each begins with others of the next images, or all would wait for the one that has the first image.
    """

    def __init__(self, reader: ImageReader, *, num_processes: int, max_bytes: int, turn: tuple[int, int] = (0, 1)):
        self._reader, self._max_bytes, self._turn = reader, max_bytes, turn
        self._pool: WorkerPool[Path, _Decoded] = WorkerPool(partial(_decode, reader=reader), num_processes)
        self._lock = threading.RLock()
        self._wanted: dict[Path, None] = {}
        self._begun: dict[Path, Future[_Decoded]] = {}
        self._waiting_bytes: dict[Path, int] = {}
        self._num_running = 0
        self._has_warned = self._was_full = False
        atexit.register(self.close)  # the last one registered comes first: the store's folder is still there

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded images that wait to be taken."""
        with self._lock:
            return sum(self._waiting_bytes.values())

    def expect(self, paths: Iterable[Path]) -> None:
        """These will be needed next, the first one first; what was expected before and is not among them is let go."""
        with self._lock:
            self._was_full |= bool(self._wanted) and self.num_bytes >= self._max_bytes
            expected = dict.fromkeys(paths)
            for path in [path for path in self._begun if path not in expected]:
                self._take(path).cancel()
            ordered = in_turn(tuple(expected), self._turn, own=OWN_IMAGES * self._pool.num_processes)
            self._wanted = {path: None for path in ordered if path not in self._begun}
            self._begin()

    def take_was_full(self) -> bool:
        """Whether, since the last call, ``max_bytes`` were reached before others were expected."""
        with self._lock:
            was_full, self._was_full = self._was_full, False
            return was_full

    def holds(self, path: Path) -> bool:
        """Whether the image has been begun and not taken yet."""
        with self._lock:
            return path in self._begun

    def read(self, path: Path) -> StoredImage:
        """As ``ImageReader.read``; decoded here and now where that has not begun elsewhere.

        Raises UserError as it does, and where the process that decoded it died of it, twice.
        """
        with self._lock:
            self._wanted.pop(path, None)
            begun = self._take(path) if path in self._begun else None
            self._begin()
        unshared = None if begun is None else self._unshared(path, begun)
        return self._reader.read(path) if unshared is None else self._reader.keep(path, unshared)

    def close(self) -> None:
        """End the processes; one that does not end its image soon is not waited for, and ends with this process."""
        atexit.unregister(self.close)
        with self._lock:
            self._wanted = {}
        self._pool.close(CLOSE_SECONDS)

    def _unshared(self, path: Path, begun: Future[_Decoded]) -> StoredImage | None:
        """The image of a process that could not share it; None where it has to be looked for in the store."""
        try:
            try:
                return begun.result().unshared
            except WorkerDied as error:
                # The kernel may have ended it for memory that others took. What a decoder crashes over, it does again.
                logger.warning("%s: %s; it is tried once more", path, error.what)
                return self._pool.submit(path).result().unshared
        except CancelledError:  # the processes are being ended
            return None
        except WorkerNotStarted as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("images are not decoded ahead, but by this process: %s", error)
            return None
        except RuntimeError as error:  # an error in decoding it, which is met here again where the image is to blame
            logger.warning("%s could not be decoded ahead: %s", path, error)
            return None

    def _take(self, path: Path) -> Future[_Decoded]:
        self._waiting_bytes.pop(path, None)
        return self._begun.pop(path)

    def _begin(self) -> None:
        """Give the processes what they have room for."""
        while self._wanted and self._num_running < 2 * self._pool.num_processes and self.num_bytes < self._max_bytes:
            path = next(iter(self._wanted))
            del self._wanted[path]
            self._num_running += 1
            future = self._begun[path] = self._pool.submit(path)
            future.add_done_callback(partial(self._finish, path))

    def _finish(self, path: Path, future: Future[_Decoded]) -> None:
        with self._lock:
            self._num_running -= 1
            if self._begun.get(path) is future and not future.cancelled() and future.exception() is None:
                self._waiting_bytes[path] = future.result().num_bytes
            self._begin()


def in_turn(paths: Sequence[Path], turn: tuple[int, int], *, own: int) -> list[Path]:
    """The order in which number ``turn[0]`` of ``turn[1]`` looks at the images that all of them want in this order.

    In each part of about ``own`` images for each, its own come first; whose they are their paths say, as not all need
    have the same list. Then it goes on with the others', in case these are behind: what they have done it finds.
    """
    number, count = turn

    def key(position: int) -> tuple[int, int]:
        owner = zlib.crc32(str(paths[position]).encode("utf-8", "surrogatepass"))
        return position // (own * count), (owner - number) % count

    return [paths[position] for position in sorted(range(len(paths)), key=key)]


class _Decoded(NamedTuple):
    """What a process says of an image."""

    num_bytes: int
    unshared: StoredImage | None
    """The image, where it could not be left in the store."""


def _decode(path: Path, *, reader: ImageReader) -> _Decoded:
    image = reader.read(path)
    return _Decoded(image.pixels.nbytes, None if image.is_shared else image)
