"""A least-recently-used cache with a bound on bytes, not on entries: one image can be a thousand times another."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteBoundedCache(Generic[Value]):
    """Keeps the values used last whose sizes add up to at most ``max_bytes``; for any number of threads."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self.num_bytes = 0
        """Bytes of all kept values."""

    def get(self, key: Hashable) -> Value | None:
        """The value under ``key``, which counts as used now; None if it is not kept."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Value, *, num_bytes: int) -> None:
        """Keep ``value`` (unless it is larger than the bound) and drop the least recently used beyond the bound."""
        with self._lock:
            if key in self._entries:
                self.num_bytes -= self._entries.pop(key)[1]
            if num_bytes > self._max_bytes:
                return
            self._entries[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= self._entries.popitem(last=False)[1][1]
