"""What a step loses to its data: logged at every step, and said once where it is more than a little."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from perl_megatron.config.schema import DataConfig
from perl_megatron.data.wait_clock import DataWaits

MAX_SHARE = 0.05
"""Of the time of several steps: more than that is said."""
STEPS = 5
"""Looked at together: one slow file is no bottleneck."""


class DataIdle:
    """Follows the waits of a run's steps.

    The first step of a start counts for nothing: its images were decoded while the policy was built, if at all.

    Args:
        config: what a person can change about it.
        note: tells a person something.
    """

    def __init__(self, config: DataConfig, note: Callable[[str], None]):
        self._config, self._note = config, note
        self._steps: deque[tuple[DataWaits, float]] = deque(maxlen=STEPS)
        self._is_first, self._is_told = True, False

    def follow(self, waits: DataWaits, step_seconds: float) -> dict[str, float]:
        """Metrics of a step that took ``step_seconds`` with its ``waits``."""
        if not self._is_first:
            self._steps.append((waits, step_seconds))
        self._is_first = False
        self._tell_once()
        return {"data/idle_share": waits.total / step_seconds, "data/image_wait_seconds": waits.images}

    def _tell_once(self) -> None:
        waits = sum((waits for waits, _ in self._steps), DataWaits())
        seconds = sum(seconds for _, seconds in self._steps)
        if self._is_told or len(self._steps) < STEPS or waits.total <= MAX_SHARE * seconds:
            return
        self._is_told = True
        self._note(
            f"the last {STEPS} steps waited for data for {waits.total / seconds:.0%} of their time, "
            f"{waits.total / STEPS:.2g} s a step (data/idle_share): {self._fix(waits)}"
        )

    def _fix(self, waits: DataWaits) -> str:
        config = self._config
        if waits.dropped > waits.total / 2:
            return (
                "most of it for images that were decoded before, and whose pixels did not stay: raise "
                f"data.pixel_cache_mib = {config.pixel_cache_mib} (of shared memory, on each node)"
            )
        if waits.images > waits.total / 2 and waits.ahead_was_full:
            return (
                "most of it for images to be decoded, though as many had been decoded ahead as may wait: raise "
                f"data.decode_ahead_mib = {config.decode_ahead_mib}, and data.pixel_cache_mib = "
                f"{config.pixel_cache_mib} to twice that or more"
            )
        if waits.images > waits.total / 2:
            return (
                f"most of it for images to be decoded: raise data.decode_processes = {config.decode_processes} (each "
                "rank's), where the node has more cores, or make the image files smaller"
            )
        before = "" if config.check == "load" else "; with data.check=load they are read and checked before the run"
        return (
            "most of it for records to be read and encoded by every process, not for images: keep the records on a "
            f"fast disk{before}"
        )
