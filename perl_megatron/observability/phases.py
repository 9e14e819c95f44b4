"""How long each phase of a step takes, and which phase it is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """`with phases("update"): …` adds the wall time to that phase.

    Args:
        on_enter: called with the name of the phase that begins (progress shows it).
    """

    def __init__(self, on_enter: Callable[[str], None] | None = None):
        self._on_enter = on_enter
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._step_start = time.perf_counter()

    @property
    def current(self) -> str | None:
        """The innermost phase, None between phases."""
        return self._stack[-1] if self._stack else None

    @property
    def elapsed(self) -> float:
        """Seconds since the last call of ``take``."""
        return time.perf_counter() - self._step_start

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as phase `name`; an exception that passes through gets a note with the name."""
        self._stack.append(name)
        if self._on_enter is not None:
            self._on_enter(name)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(f"in phase '{name}'")
            raise
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """`seconds/PHASE` of each phase and `seconds/step` since the last call; starts again from zero."""
        now = time.perf_counter()
        metrics = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        metrics["seconds/step"] = now - self._step_start
        self._seconds, self._step_start = {}, now
        return metrics
