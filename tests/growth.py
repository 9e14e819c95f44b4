"""How the time of a piece of work grows with its size, on a machine of whatever speed that has other things to do."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

SHORTEST = 0.001
"""Seconds; what takes less is not told apart."""


def least_seconds(work: Callable[[], object]) -> float:
    """Processor time of the quickest of three, without collecting the garbage of other tests."""
    found = []
    gc.disable()
    try:
        for _ in range(3):
            begin = time.process_time()
            work()
            found.append(time.process_time() - begin)
    finally:
        gc.enable()
    return min(found)


def is_linear(work: Callable[[int], object], size: int) -> bool:
    """Whether eight times the work takes about eight times as long, and not sixty-four times.

    ``work`` is called with ``size`` and with an eighth of it.
    """
    few, many = (least_seconds(lambda n=n: work(n)) for n in (size // 8, size))  # type: ignore[misc]
    return many < 24 * max(few, SHORTEST)
