import math
import os
import signal

import pytest

from perl_megatron.runtime import grace as module
from perl_megatron.runtime.grace import Grace
from perl_megatron.runtime.signals import StopRequest

STEP = {"seconds/step": 10.0, "seconds/log_probs": 1.0, "seconds/update": 3.0, "seconds/save": 2.0, "step": 7.0}


class Clock:
    """Stands still ``seconds`` after the signal, for tests that a busy machine interrupts."""

    stop: StopRequest
    seconds = 0.0

    def monotonic(self) -> float:
        return self.stop.received_at + self.seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(Clock, "stop", None, raising=False)
    monkeypatch.setattr(module, "time", Clock())
    return module.time


def told(grace_seconds: float, number: signal.Signals | None = signal.SIGUSR1) -> Grace:
    """With the signal just received, if any."""
    with StopRequest() as stop:
        if number is not None:
            os.kill(os.getpid(), number)
    Clock.stop = stop
    return Grace(stop, grace_seconds)


def test_nobody_hurries_before_a_signal_nor_after_ctrl_c():
    for number in (None, signal.SIGINT):
        grace = told(1e-6, number)
        assert grace.seconds_left() == math.inf
        assert not grace.is_over_before_step(elapsed=0)
        assert not grace.is_over_before("evaluate")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_of_a_first_step_nothing_is_known(number):
    assert told(1e6, number).is_over_before_step(elapsed=0)


def test_the_rest_of_the_step_and_a_checkpoint_have_to_fit():
    # The step took 8 s without the last one's checkpoint; 1.25 times what is left of them, and 2 s for the checkpoint.
    for seconds, elapsed, fits in ((13, 0, True), (11, 0, False), (8, 4, True), (6.5, 4, False)):
        grace = told(seconds)
        grace.learn(STEP)
        assert grace.is_over_before_step(elapsed) is not fits, (seconds, elapsed)


def test_a_step_that_takes_longer_than_the_last_one_has_still_its_update_before_it():
    for seconds, fits in ((7.5, True), (6.5, False)):
        grace = told(seconds)
        grace.learn(STEP)
        assert grace.is_over_before_step(elapsed=100) is not fits


def test_the_period_begins_with_the_signal(clock: Clock):
    grace = told(30)
    for seconds in (0, 10, 40):
        clock.seconds = seconds
        assert grace.seconds_left() == pytest.approx(30 - seconds)


def test_an_evaluation_is_begun_only_if_it_can_end():
    grace = told(10)
    assert grace.is_over_before("evaluate")
    grace.learn({"seconds/evaluate": 6.0, "seconds/save": 2.0})
    assert not grace.is_over_before("evaluate")
    grace.learn({"seconds/evaluate": 7.0})
    assert grace.is_over_before("evaluate")


def test_a_period_that_is_too_short_is_told_before_it_begins():
    grace = told(8, None)
    assert grace.too_short_for(sampling=True, evaluating=True) is None
    grace.learn({**STEP, "seconds/generate": 6.0})
    assert grace.too_short_for(sampling=True, evaluating=True) == ("generate", 9.5)
    assert grace.too_short_for(sampling=False, evaluating=True) is None
    grace.learn({"seconds/update": 3.0, "save/background_seconds": 1.5})
    assert grace.too_short_for(sampling=False, evaluating=True) == ("update", 8.5)
    grace.learn({"seconds/update": 4.0, "save/background_seconds": 0.0})
    assert grace.too_short_for(sampling=False, evaluating=True) == ("update", 8.25)


def test_an_evaluation_that_is_longer_than_the_period_is_told_too():
    """It is begun where no signal has come yet, and is not broken off when one comes."""
    grace = told(8, None)
    grace.learn({**STEP, "seconds/evaluate": 4.0})
    assert grace.too_short_for(sampling=False, evaluating=True) is None
    grace.learn({"seconds/evaluate": 5.0})
    assert grace.too_short_for(sampling=False, evaluating=True) == ("evaluate", 8.25)
    assert grace.too_short_for(sampling=False, evaluating=False) is None
