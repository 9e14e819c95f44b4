"""Reading tensors while earlier ones are being written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from perl_megatron.checkpoint.file_groups import ReadTensor

BUFFER_BYTES = 1 << 28
"""Tensors are read ahead until they are so large together, and one of any size."""


class ReadAhead:
    """Gives the named tensors in their order; one thread reads the next ones meanwhile. Leave the context to end it.

    ``coming``: (name, bytes) of every tensor that will be asked for.
    """

    def __init__(self, read: ReadTensor, coming: Iterable[tuple[str, int]], *, buffer_bytes: int = BUFFER_BYTES):
        self._read, self._buffer_bytes = read, buffer_bytes
        self._coming: Iterator[tuple[str, int]] = iter(coming)
        self._pending: deque[tuple[str, int, Future[torch.Tensor]]] = deque()
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, name: str) -> torch.Tensor:
        """The next tensor, which must have this name. Raises what reading it raised."""
        expected, _, future = self._pending.popleft()
        assert name == expected, (name, expected)
        tensor = future.result()
        self._fill()
        return tensor

    def _fill(self) -> None:
        while not self._pending or sum(nbytes for _, nbytes, _ in self._pending) < self._buffer_bytes:
            following = next(self._coming, None)
            if following is None:
                return
            name, nbytes = following
            self._pending.append((name, nbytes, self._thread.submit(self._read, name)))

    def __enter__(self) -> ReadAhead:
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
