"""One-step-off training: the rollouts of the next step are sampled while the trainer updates.

Those of step k + 1 are begun when the engine has the weights of step k, and are used one update later: they are one
version old. The engine has to work on other processors than the trainer; while it samples, its weights stay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from perl_megatron.collect import GroupCollector, Phase
from perl_megatron.data.wait_clock import DataWaits
from perl_megatron.drawn import Drawn
from perl_megatron.errors import UserError
from perl_megatron.rollout.server_engine import ServerEngine
from perl_megatron.runtime import collective
from perl_megatron.step_in_progress import StepInProgress

END_SECONDS = 20.0
"""What rollouts that are given up may take to end: their processes' agreements should not be torn."""


class AheadCollector:
    """``GroupCollector`` whose next step is under way in a thread of its own; all ranks together.

    Args:
        collector: collects one step.
        engine: the collector's.
        alpha_of: the swap probability of a step.
        num_steps: of the run; nothing is begun beyond.
        timeout_seconds: of the collectives of what is under way.
    """

    def __init__(
        self,
        collector: GroupCollector,
        engine: ServerEngine,
        alpha_of: Callable[[int], float],
        *,
        num_steps: int,
        timeout_seconds: float,
    ):
        self._collector, self._engine = collector, engine
        self._alpha_of, self._num_steps = alpha_of, num_steps
        self._group = collective.new_group(timeout_seconds)
        self._pending: _Pending | None = None
        self._waited_seconds, self._waits_beside = 0.0, DataWaits()
        self._bring_last_weights = engine.bring_again
        engine.bring_again = self._ask_for_weights

    def collect(self, step: int, alpha: float) -> Drawn:
        """The groups of ``step``, begun during the last one where there was one; the next step's are begun.

        Raises:
            UserError: as ``GroupCollector.collect``.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            drawn = self._collector.collect(step, alpha)
        else:
            assert pending.step == step, f"the groups of step {pending.step} are not those of step {step}"
            drawn, self._waits_beside = pending.result(), pending.data_waits
        if step + 1 < self._num_steps and not (drawn.exhausted or drawn.is_interrupted):
            self._pending = _Pending(self._collector, step + 1, self._alpha_of(step + 1), self._group)
            self._pending.thread.start()
        return drawn

    def await_rollouts(self, bring_weights: Callable[[], None]) -> None:
        """Wait until nothing is under way; the engine may then be given other weights.

        ``bring_weights`` is called, by all ranks, where servers lost their weights and have to be brought the current
        ones before the rollouts can go on. Raises UserError where the rollouts failed.
        """
        if self._pending is not None:
            begin = time.perf_counter()
            self._pending.wait(lambda: self._bring(bring_weights))
            self._waited_seconds += time.perf_counter() - begin - self._pending.bring_seconds

    def watch(self, phases: Phase) -> None:
        """Nothing: the phases of a thread beside the trainer are not the trainer's."""

    def take_waits(self) -> DataWaits:
        """What the trainer has waited for data since the last call: what it would not, if data took no time.

        Where it waited for rollouts, they would have been there sooner by what their thread waited for data.
        """
        beside = self._waits_beside.at_most(self._waited_seconds)
        self._waited_seconds, self._waits_beside = 0.0, DataWaits()
        return self._collector.take_waits() + beside

    def close(self) -> None:
        """Give up what is under way: it would be drawn again."""
        if self._pending is not None:
            self._pending.give_up()
            self._engine.give_up()
            self._pending.thread.join(END_SECONDS)
        self._collector.close()

    def state(self) -> Callable[[], dict[str, Any]]:
        """As ``GroupCollector.state``; what is under way will be drawn again."""
        return self._collector.state() if self._pending is None else self._pending.state_before

    def load_state(self, state: dict[str, Any]) -> None:
        """As ``GroupCollector.load_state``."""
        self._collector.load_state(state)

    @property
    def in_progress(self) -> StepInProgress | None:
        """As ``GroupCollector.in_progress``; what is under way beside an update is drawn again."""
        return self._collector.in_progress if self._pending is None else None

    def go_on_with(self, left: StepInProgress) -> None:
        """As ``GroupCollector.go_on_with``."""
        self._collector.go_on_with(left)

    def stop_by(self, must_stop: Callable[[], bool]) -> None:
        """As ``GroupCollector.stop_by``."""
        self._collector.stop_by(must_stop)

    def _bring(self, bring_weights: Callable[[], None]) -> None:
        bring_weights()  # does nothing where servers were brought the current ones before, and lost them again
        self._bring_last_weights()

    def _ask_for_weights(self) -> None:
        """Called where servers lost their weights in the middle of sampling: only the main thread can bring them.

        The trainer's own collectives would meet those of an export in this thread.
        """
        pending = self._pending
        if pending is None or threading.current_thread() is not pending.thread:
            self._bring_last_weights()
        else:
            pending.ask_for_weights()


class _Pending:
    """The groups of a step that are being collected."""

    def __init__(self, collector: GroupCollector, step: int, alpha: float, group: object):
        self.step = step
        self.state_before = collector.state()
        self.data_waits, self.bring_seconds = DataWaits(), 0.0
        self._collector, self._alpha, self._group = collector, alpha, group
        self._drawn: Drawn | None = None
        self._error: BaseException | None = None
        self._condition = threading.Condition()
        self._wants_weights = self._is_done = self._is_given_up = False
        # Not waited for where the run ends with an error: the other ranks may be gone.
        self.thread = threading.Thread(target=self._run, name=f"rollouts of step {step}", daemon=True)

    def wait(self, bring_weights: Callable[[], None]) -> None:
        """Until it is done; raises what went wrong."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._is_done or self._wants_weights)
                if self._is_done:
                    break
            begin = time.perf_counter()
            bring_weights()
            self.bring_seconds += time.perf_counter() - begin
            with self._condition:
                self._wants_weights = False
                self._condition.notify_all()
        if self._error is not None:
            raise self._error

    def result(self) -> Drawn:
        """What was drawn; ``wait`` comes first."""
        assert self._drawn is not None, "the rollouts were not waited for"
        return self._drawn

    def ask_for_weights(self) -> None:
        """From the thread: let whoever waits bring weights, and go on when they are there."""
        with self._condition:
            self._wants_weights = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._wants_weights or self._is_given_up)
            if self._is_given_up:
                raise UserError("the rollouts were given up, as the run ends", where="rollout.max_staleness")

    def give_up(self) -> None:
        """Nobody will wait for it."""
        with self._condition:
            self._is_given_up = True
            self._condition.notify_all()

    def _run(self) -> None:
        try:
            with collective.over(self._group):  # type: ignore[arg-type]
                self._drawn = self._collector.collect(self.step, self._alpha)
            self.data_waits = self._collector.take_waits()
        except BaseException as error:
            self._error = error
        finally:
            with self._condition:
                self._is_done = True
                self._condition.notify_all()
