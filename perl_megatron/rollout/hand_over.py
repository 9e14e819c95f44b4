"""One producer hands things to a consumer in another thread, one at a time, and neither waits for a dead one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class GivenUp(Exception):
    """The other side gave up; the text says why."""


class HandOver(Generic[Item]):
    """At most one item lies between the two: memory stays bounded by the slower one."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._items: list[Item] = []
        self._is_complete = False
        self.reason: str | None = None
        """Why it was given up; None while it was not."""

    @property
    def is_given_up(self) -> bool:
        """Whether either side gave up."""
        return self.reason is not None

    def put(self, item: Item, *, seconds: float) -> bool:
        """Hand over an item; False where it was given up, or the last one was not taken within ``seconds``."""
        until = time.monotonic() + seconds
        with self._condition:
            while self._items and not self.is_given_up:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._condition.wait(left)
            if self.is_given_up:
                return False
            self._items.append(item)
            self._condition.notify_all()
            return True

    def complete(self) -> None:
        """Nothing follows."""
        with self._condition:
            self._is_complete = True
            self._condition.notify_all()

    def give_up(self, reason: str) -> None:
        """By either side: nobody waits any more, and what lies between is dropped. The first reason stays."""
        with self._condition:
            if self.reason is None:
                self.reason = reason
            self._items.clear()
            self._condition.notify_all()

    def check(self) -> None:
        """Raise ``GivenUp`` where it was given up."""
        if self.reason is not None:
            raise GivenUp(self.reason)

    def wait_given_up(self, seconds: float) -> bool:
        """Whether it is given up within ``seconds``."""
        with self._condition:
            return self._condition.wait_for(lambda: self.is_given_up, seconds)

    def __iter__(self) -> Iterator[Item]:
        """What is handed over, to the end; raises ``GivenUp`` where that does not come."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._items or self._is_complete or self.is_given_up)
                self.check()
                if not self._items:
                    return
                item = self._items.pop()
                self._condition.notify_all()
            yield item
            del item  # it would live on while the next one is made
