"""What the garbage collector has to look at."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def stay() -> None:
    """What there is now stays to the end: from here on the collector does not go over all of it, step after step.

    The libraries alone are a million objects: half a second for each time that megatron-core collects, twice for every
    checkpoint.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is collected within the block, and what it makes stays: to be put around imports.

    They make a million objects, hardly one of them garbage, and the collector goes over all of them again and again: a
    fifth of the time until a process has torch, transformers and megatron-core.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
