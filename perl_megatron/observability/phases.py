"""How long each phase of a step takes, and which phase it is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Phases:
    """`with phases("update"): …` adds the wall time to that phase.

    Args:
        on_enter: called with the name of the phase that begins, and what the ranks have to agree on before it.
        on_leave: called when it is over, however it ended.
    """

    def __init__(
        self,
        on_enter: Callable[[str, Mapping[str, Any]], None] = lambda name, facts: None,
        on_leave: Callable[[], None] = lambda: None,
    ):
        self._on_enter, self._on_leave = on_enter, on_leave
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

    def spent(self, name: str) -> float:
        """Seconds in a phase since the last call of ``take``; not those of one that is under way."""
        return self._seconds.get(name, 0.0)

    @property
    def depth(self) -> int:
        """How many phases are within each other: 1 in one that is in no other."""
        return len(self._stack)

    @contextmanager
    def __call__(self, name: str, **facts: Any) -> Iterator[None]:
        """Time the block as phase `name`; an exception that passes through gets a note with the name.

        ``facts`` (JSON) are what all ranks should be about to do alike: the step, the number of sequences.
        """
        self._stack.append(name)
        start = time.perf_counter()
        try:
            self._on_enter(name, facts)
            yield
        except Exception as error:
            error.add_note(f"in phase '{name}'")
            raise
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._stack.pop()
            self._on_leave()

    def leave_out(self, name: str) -> float:
        """Seconds of a phase since the last call of ``take``; they belong to no step, neither of that nor of the next.

        So from here on they are not in ``elapsed``, and the next ``take`` does not have them.
        """
        seconds = self._seconds.pop(name, 0.0)
        self._step_start += seconds
        return seconds

    def take(self) -> dict[str, float]:
        """`seconds/PHASE` of each phase and `seconds/step` since the last call; starts again from zero."""
        now = time.perf_counter()
        metrics = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        metrics["seconds/step"] = now - self._step_start
        self._seconds, self._step_start = {}, now
        return metrics
