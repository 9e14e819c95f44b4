"""The phases of an evaluation by an engine, and where it ends when it is told to."""

from __future__ import annotations

import os
import signal

import pytest

from perl_megatron.evaluation.asking import Reply
from perl_megatron.evaluation.watched_asker import EvaluationStopped, WatchedAsker
from perl_megatron.rollout.engine import Sampling
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.runtime.watchdog import Watchdog

SAMPLING = Sampling(temperature=0.0, top_p=1.0, max_tokens=1, num_rollouts=1)


class Watched(Watchdog):
    """Notes what is entered and left."""

    def __init__(self) -> None:
        super().__init__({}, rank=0, world_size=1)
        self.notes: list[str] = []

    def enter(self, name: str) -> None:
        super().enter(name)
        self.notes.append(name)

    def leave(self) -> None:
        self.notes.append(f"not {self._phases[-1].name}")
        super().leave()


class Answers:
    name = "an engine"

    def __init__(self, watchdog: Watched):
        self._watchdog = watchdog

    def ask(self, views: object, sampling: Sampling) -> list[list[Reply]]:
        self._watchdog.notes.append("asked")
        return [[Reply("7", "stop")]]


def test_asking_is_one_phase_and_all_the_rest_another() -> None:
    with Watched() as watchdog, StopRequest() as stop:
        with WatchedAsker(Answers(watchdog), watchdog=watchdog, stop=stop) as asker:
            for _ in range(2):
                assert asker.ask([], SAMPLING) == [[Reply("7", "stop")]]
        chunk = ["not evaluate", "generate", "asked", "not generate", "evaluate"]
        assert watchdog.notes == ["evaluate", *chunk, *chunk, "not evaluate"]


def test_who_is_told_to_end_asks_no_more() -> None:
    with Watched() as watchdog, StopRequest() as stop:
        with WatchedAsker(Answers(watchdog), watchdog=watchdog, stop=stop) as asker:
            asker.ask([], SAMPLING)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(EvaluationStopped):
                asker.ask([], SAMPLING)
        assert watchdog.notes.count("asked") == 1
        assert watchdog.notes[-2:] == ["evaluate", "not evaluate"]
