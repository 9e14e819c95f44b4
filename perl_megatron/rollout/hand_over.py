"""One producer hands things to a consumer in another thread, one at a time, and neither waits for a dead one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class HandOver(Generic[Item]):
    """At most one item lies between the two: memory stays bounded by the slower one."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._items: list[Item] = []
        self._is_complete = self._is_given_up = False

    @property
    def is_given_up(self) -> bool:
        """Whether either side gave up."""
        return self._is_given_up

    def put(self, item: Item, *, seconds: float) -> bool:
        """Hand over an item; False where the consumer gave up, or did not take the last one within ``seconds``."""
        until = time.monotonic() + seconds
        with self._condition:
            while self._items and not self._is_given_up:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._condition.wait(left)
            if self._is_given_up:
                return False
            self._items.append(item)
            self._condition.notify_all()
            return True

    def complete(self) -> None:
        """Nothing follows."""
        with self._condition:
            self._is_complete = True
            self._condition.notify_all()

    def give_up(self) -> None:
        """By either side: nobody waits any more, and what lies between is dropped. The consumer gets RuntimeError."""
        with self._condition:
            self._is_given_up = True
            self._items.clear()
            self._condition.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._condition:
                while not (self._items or self._is_complete or self._is_given_up):
                    self._condition.wait()
                if self._is_given_up:
                    raise RuntimeError("the other side gave up")
                if not self._items:
                    return
                item = self._items.pop()
                self._condition.notify_all()
            yield item
