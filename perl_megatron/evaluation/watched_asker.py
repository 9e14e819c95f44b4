"""An evaluation by an engine has deadlines, and ends between two chunks when it is told to."""

from __future__ import annotations

from collections.abc import Sequence

from perl_megatron.evaluation.asking import Asker, Reply
from perl_megatron.rollout.engine import Sampling
from perl_megatron.runtime.collective import any_rank
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.runtime.watchdog import Watchdog
from perl_megatron.types import View


class EvaluationStopped(Exception):
    """A rank was told to end; on all ranks."""


class WatchedAsker:
    """Asks ``asker``, each time in the phase 'generate'; before, between and after, the phase is 'evaluate'.

    No phase covers the whole, as benchmarks may take days. A context manager; all ranks make it and ask it together.
    """

    def __init__(self, asker: Asker, *, watchdog: Watchdog, stop: StopRequest):
        self.name = asker.name
        self._asker, self._watchdog, self._stop = asker, watchdog, stop

    def __enter__(self) -> WatchedAsker:
        self._watchdog.enter("evaluate")
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.leave()

    def ask(self, views: Sequence[View], sampling: Sampling) -> list[list[Reply]]:
        """As every ``Asker``. Raises ``EvaluationStopped`` instead where a rank has been told to end."""
        if self._stop.requested(any_rank):
            raise EvaluationStopped
        self._watchdog.leave()
        try:
            with self._watchdog.phase("generate"):
                return self._asker.ask(views, sampling)
        finally:
            self._watchdog.enter("evaluate")
