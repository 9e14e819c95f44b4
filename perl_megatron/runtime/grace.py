"""How long a run that has been told to go may still work, and whether that is enough for what it is about to do."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping

from perl_megatron.runtime.signals import StopRequest

MARGIN = 1.25
"""What is about to be done may take so many times what it took last."""

TRAINING = ("log_probs", "update")
"""The phases of a step after its groups are there."""


class Grace:
    """The time between the signal that ends a run and the end of its machine.

    Ctrl-C comes from a person who waits, not from a machine that is taken away: it ends a run after the current step,
    however long that takes.

    Args:
        stop: whether and when the signal came.
        seconds: from the signal until nothing of the run may be left (`launch.grace_seconds`).
    """

    def __init__(self, stop: StopRequest, seconds: float):
        self._stop, self._seconds = stop, seconds
        self._took: dict[str, float] = {}

    def learn(self, times: Mapping[str, float]) -> None:
        """Take note of what a step, its phases and a checkpoint took: metrics `seconds/…` and `save/…`."""
        took = {name: seconds for name, seconds in times.items() if name.startswith(("seconds/", "save/"))}
        if "seconds/step" in took:
            took["seconds/step"] -= took.get("seconds/save", 0.0)  # the last step's checkpoint
        self._took |= took

    def is_over_before_step(self, elapsed: float) -> bool:
        """Whether the step under way, of ``elapsed`` seconds so far, would end too late for a checkpoint after it.

        As in what ``learn`` knows of a step, the checkpoint of the one before does not belong to those seconds.
        Of a run that has not made a step yet nothing is known: any grace period is too short.
        """
        if self.seconds_left() == math.inf:
            return False
        step = self._took.get("seconds/step", math.inf)
        training = sum(self._took.get(f"seconds/{phase}", 0.0) for phase in TRAINING)
        return not self._leaves(max(step - elapsed, training))

    def is_over_before(self, phase: str) -> bool:
        """Whether ``phase`` would end too late for a checkpoint after it."""
        return self.seconds_left() < math.inf and not self._leaves(self._took.get(f"seconds/{phase}", math.inf))

    def seconds_left(self) -> float:
        """Of the grace period, possibly negative; infinite where no signal has begun one."""
        if self._stop.received in (None, signal.SIGINT):
            return math.inf
        return self._seconds - (time.monotonic() - self._stop.received_at)

    def too_short_for(self, *, sampling: bool, evaluating: bool) -> tuple[str, float] | None:
        """What cannot be interrupted and would not end within a grace period that began as it did, with its seconds.

        None where all would: the update with the log-probabilities before it, with ``sampling`` a step's sampling, and
        with ``evaluating`` an evaluation.
        """
        for name, phases, is_asked in (
            ("generate", ("generate",), sampling),
            ("update", TRAINING, True),
            ("evaluate", ("evaluate",), evaluating),
        ):
            seconds = MARGIN * sum(self._took.get(f"seconds/{phase}", 0.0) for phase in phases) + self._checkpoint()
            if is_asked and seconds > self._seconds:
                return name, seconds
        return None

    def _leaves(self, seconds: float) -> bool:
        return MARGIN * seconds + self._checkpoint() <= self.seconds_left()

    def _checkpoint(self) -> float:
        """What the last one took, in the training's time and beside it; the last of a run is waited for."""
        return self._took.get("seconds/save", 0.0) + self._took.get("save/background_seconds", 0.0)
