"""How long a step waits for its data: nothing is sampled and nothing is trained meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Wait = Literal["questions", "images", "dropped"]
"""For questions to be drawn, checked and encoded; for images to be decoded; for images whose pixels had been dropped
between two uses, to be decoded again."""


@dataclass(frozen=True)
class DataWaits:
    """Seconds that were waited."""

    total: float = 0.0
    images: float = 0.0
    """Of the total: until images were decoded, by whichever process."""
    dropped: float = 0.0
    """Of these: images that had been decoded before, whose pixels did not stay until they were needed again."""
    ahead_was_full: bool = False
    """Whether all was decoded ahead that may wait, and more images were wanted."""

    def __add__(self, other: DataWaits) -> DataWaits:
        return DataWaits(
            self.total + other.total,
            self.images + other.images,
            self.dropped + other.dropped,
            self.ahead_was_full or other.ahead_was_full,
        )

    def at_most(self, seconds: float) -> DataWaits:
        """So much of the total, and the same share of its parts."""
        share = min(1.0, seconds / self.total) if self.total > 0 else 0.0
        return DataWaits(share * self.total, share * self.images, share * self.dropped, self.ahead_was_full)


class WaitClock:
    """`with clock("images"): …` adds the wall time to what this thread has waited; a wait within a wait counts once."""

    def __init__(self) -> None:
        self._of_thread = _Waits()

    @contextmanager
    def __call__(self, what: Wait) -> Iterator[None]:
        """Time the block, however it ends."""
        mine = self._of_thread
        is_first, is_outer = what not in mine.open, not mine.open
        mine.open.append(what)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            mine.open.pop()
            if is_first:
                mine.seconds[what] = mine.seconds.get(what, 0.0) + seconds
            if is_outer:
                mine.total += seconds

    def take(self) -> DataWaits:
        """What the calling thread has waited since the last call; not to be called within a wait."""
        mine = self._of_thread
        assert not mine.open, "a wait is taken when it is over"
        waits = DataWaits(mine.total, mine.seconds.get("images", 0.0), mine.seconds.get("dropped", 0.0))
        mine.total, mine.seconds = 0.0, {}
        return waits


class _Waits(threading.local):
    """Of one thread."""

    def __init__(self) -> None:
        self.open: list[Wait] = []
        self.seconds: dict[Wait, float] = {}
        self.total = 0.0
