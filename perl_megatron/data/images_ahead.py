"""Images that other processes decode before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from PIL import Image

from perl_megatron.data.images import load_image
from perl_megatron.data.worker_pool import WorkerPool

Pixels = tuple[tuple[int, int], bytes]
"""(width, height), and the bytes of the RGB pixels, row by row."""


class ImagesAhead:
    """``load_image`` with a head start: what is expected is decoded by ``num_processes`` processes, in that order.

    Decoded images wait until they are taken, up to ``max_bytes`` and the few that were under way when it was reached;
    then nothing more is begun. For any number of threads.
    """

    def __init__(self, min_pixels: int, max_pixels: int, *, num_processes: int, max_bytes: int):
        self._min_pixels, self._max_pixels, self._max_bytes = min_pixels, max_pixels, max_bytes
        self._pool: WorkerPool[Path, Pixels] = WorkerPool(
            partial(_decode, min_pixels=min_pixels, max_pixels=max_pixels), num_processes
        )
        self._lock = threading.RLock()
        self._wanted: dict[Path, None] = {}
        self._begun: dict[Path, Future[Pixels]] = {}
        self._waiting_bytes: dict[Path, int] = {}
        self._num_running = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded images that wait to be taken."""
        with self._lock:
            return sum(self._waiting_bytes.values())

    def expect(self, paths: Iterable[Path]) -> None:
        """These will be needed next, the first one first; what was expected before and is not among them is let go."""
        with self._lock:
            expected = dict.fromkeys(paths)
            for path in [path for path in self._begun if path not in expected]:
                self._take(path).cancel()
            self._wanted = {path: None for path in expected if path not in self._begun}
            self._begin()

    def holds(self, path: Path) -> bool:
        """Whether the image has been begun and not taken yet."""
        with self._lock:
            return path in self._begun

    def load(self, path: Path) -> Image.Image:
        """As ``images.load_image``; decoded here and now where that has not begun elsewhere.

        Raises UserError as it does, and where the process that decoded it died of it.
        """
        with self._lock:
            self._wanted.pop(path, None)
            begun = self._take(path) if path in self._begun else None
            self._begin()
        if begun is None:
            return load_image(path, self._min_pixels, self._max_pixels)
        size, pixels = begun.result()
        return Image.frombytes("RGB", size, pixels)

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._wanted = {}
        self._pool.close()

    def _take(self, path: Path) -> Future[Pixels]:
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

    def _finish(self, path: Path, future: Future[Pixels]) -> None:
        with self._lock:
            self._num_running -= 1
            if self._begun.get(path) is future and not future.cancelled() and future.exception() is None:
                self._waiting_bytes[path] = len(future.result()[1])
            self._begin()


def _decode(path: Path, *, min_pixels: int, max_pixels: int) -> Pixels:
    image = load_image(path, min_pixels, max_pixels)
    return image.size, image.tobytes()
