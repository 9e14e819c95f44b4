"""The next step's rollouts beside the update, with a collector and an engine that follow a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launch_ranks import launch_ranks

from perl_megatron import ahead
from perl_megatron.ahead import AheadCollector
from perl_megatron.data.wait_clock import DataWaits
from perl_megatron.drawn import Drawn
from perl_megatron.errors import UserError
from perl_megatron.training_session import TrainingSession

LONG = 20.0
MAIN = threading.main_thread()
WAITS = {True: DataWaits(1.0, 0.5, 0.25), False: DataWaits(1000.0, 200.0, 0.0)}  # in the main thread, in another one


class ScriptedEngine:
    """Notes which thread brings weights by itself, and that it was given up."""

    def __init__(self) -> None:
        self.brought: list[threading.Thread] = []
        self.is_given_up = threading.Event()
        self.give_up, self.wake, self.name = self.is_given_up.set, lambda: None, "server"
        self.bring_again: Callable[[], None] = lambda: self.brought.append(threading.current_thread())


class ScriptedCollector:
    """Draws ten records a step; ``act(step)`` is called in the middle of it."""

    def __init__(self, act: Callable[[int], object] = lambda step: None):
        self.act, self.num_drawn, self.is_closed = act, 0, False
        self.begun: list[tuple[int, float, bool]] = []

    def collect(self, step: int, alpha: float) -> Any:
        self.begun.append((step, alpha, threading.current_thread() is MAIN))
        self.num_drawn += 10
        self.act(step)
        return Drawn(step)

    def take_waits(self) -> DataWaits:
        return WAITS[threading.current_thread() is MAIN]

    def state(self) -> Callable[[], dict[str, Any]]:
        num_drawn = self.num_drawn
        return lambda: {"num_drawn": num_drawn}

    def close(self) -> None:
        self.is_closed = True


def ahead_of(collector: ScriptedCollector, engine: ScriptedEngine, num_steps: int = 4) -> AheadCollector:
    return AheadCollector(collector, engine, lambda step: step / 10, num_steps=num_steps, timeout_seconds=LONG)  # type: ignore[arg-type]


def never() -> None:
    raise AssertionError("nobody asked for weights")


def run(collector: AheadCollector, first: int, end: int) -> Iterator[Any]:
    """The steps of the loop, as far as the collector sees them."""
    for step in range(first, end):
        collector.await_rollouts(never)
        yield collector.collect(step, step / 10)


def test_each_step_gets_its_own_groups_once_and_nothing_is_begun_beyond_the_last() -> None:
    scripted = ScriptedCollector()
    collector = ahead_of(scripted, ScriptedEngine())
    assert list(run(collector, 0, 4)) == [Drawn(step) for step in range(4)]
    collector.await_rollouts(never)
    assert scripted.begun == [(0, 0.0, True), (1, 0.1, False), (2, 0.2, False), (3, 0.3, False)]


def test_a_run_of_one_step_begins_nothing() -> None:
    scripted = ScriptedCollector()
    collector = ahead_of(scripted, ScriptedEngine(), num_steps=1)
    assert list(run(collector, 0, 1)) == [Drawn(0)]
    assert len(scripted.begun) == 1


def test_the_trainer_works_while_the_next_step_is_sampled() -> None:
    """``collect`` returns at once, ``await_rollouts`` when they are there."""
    go_on = threading.Event()
    scripted = ScriptedCollector(lambda step: step == 1 and go_on.wait(LONG))
    collector = ahead_of(scripted, ScriptedEngine())
    begin = time.monotonic()
    collector.collect(0, 0.0)
    assert time.monotonic() - begin < LONG / 2
    threading.Timer(0.1, go_on.set).start()
    collector.await_rollouts(never)
    assert go_on.is_set()
    assert collector.collect(1, 0.1) == Drawn(1)


def test_data_hold_up_the_trainer_only_while_it_waits_for_rollouts() -> None:
    go_on = threading.Event()
    collector = ahead_of(ScriptedCollector(lambda step: step == 1 and go_on.wait(LONG)), ScriptedEngine())
    collector.collect(0, 0.0)
    assert collector.take_waits() == WAITS[True]
    threading.Timer(0.2, go_on.set).start()
    collector.await_rollouts(never)
    collector.collect(1, 0.1)
    assert 1.0 < collector.take_waits().total < LONG  # not the 1000 seconds beside the update
    assert collector.take_waits() == WAITS[True]  # what was waited counts once


def test_what_is_under_way_is_drawn_again_by_a_resumed_run() -> None:
    """Before, while and after it is sampled, until its step takes it."""
    go_on = threading.Event()
    scripted = ScriptedCollector(lambda step: step == 1 and go_on.wait(LONG))
    collector = ahead_of(scripted, ScriptedEngine(), num_steps=2)
    assert collector.state()() == {"num_drawn": 0}
    collector.collect(0, 0.0)
    assert collector.state()() == {"num_drawn": 10}
    go_on.set()
    collector.await_rollouts(never)
    assert scripted.num_drawn == 20
    assert collector.state()() == {"num_drawn": 10}
    collector.collect(1, 0.1)
    assert collector.state()() == {"num_drawn": 20}


def test_another_step_than_the_one_under_way_is_refused() -> None:
    collector = ahead_of(ScriptedCollector(), ScriptedEngine())
    collector.collect(0, 0.0)
    collector.await_rollouts(never)
    with pytest.raises(AssertionError, match="step 1 are not those of step 2"):
        collector.collect(2, 0.2)


@pytest.mark.parametrize("error", [UserError("no server is left"), KeyError("a bug")])
def test_an_error_comes_out_where_it_is_waited_for(error: Exception) -> None:
    """Not earlier: the update that is done meanwhile is saved. And again, whoever asks again."""

    def fail(step: int) -> None:
        if step == 1:
            raise error

    collector = ahead_of(ScriptedCollector(fail), ScriptedEngine())
    assert collector.collect(0, 0.0) == Drawn(0)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            collector.await_rollouts(never)
        assert caught.value is error
    assert collector.state()() == {"num_drawn": 10}


def test_weights_that_are_missing_are_brought_by_whoever_waits() -> None:
    """As often as they are missing; the rollouts go on only then."""
    engine, order = ScriptedEngine(), []

    def lose_weights_twice(step: int) -> None:
        if step == 1:
            for number in range(2):
                order.append(f"lost {number}")
                engine.bring_again()
                order.append(f"goes on {number}")

    collector = ahead_of(ScriptedCollector(lose_weights_twice), engine)

    def bring() -> None:
        assert threading.current_thread() is MAIN
        time.sleep(0.05)
        order.append("brought")

    collector.collect(0, 0.0)
    collector.await_rollouts(bring)
    assert order == ["lost 0", "brought", "goes on 0", "lost 1", "brought", "goes on 1"]
    # Each time also as the engine itself does: `bring` may know of weights that were lost since.
    assert engine.brought == [MAIN, MAIN]
    assert collector.collect(1, 0.1) == Drawn(1)


def test_weights_that_are_missing_at_once_are_not_brought_by_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it asks before the collector knows of it: the trainer's collectives belong to the main thread."""
    engine, asked = ScriptedEngine(), threading.Event()

    def lose_weights(step: int) -> None:
        if step == 1:
            asked.set()
            engine.bring_again()

    start = threading.Thread.start

    def start_and_lag(thread: threading.Thread) -> None:
        start(thread)
        asked.wait(LONG)
        time.sleep(0.05)

    collector = ahead_of(ScriptedCollector(lose_weights), engine)
    monkeypatch.setattr(ahead.threading.Thread, "start", start_and_lag)
    collector.collect(0, 0.0)
    brought = []
    collector.await_rollouts(lambda: brought.append(threading.current_thread()))
    assert engine.brought == [MAIN]
    assert brought == [MAIN]


def test_weights_that_are_missing_while_the_main_thread_samples_are_brought_at_once() -> None:
    engine = ScriptedEngine()
    collector = ahead_of(ScriptedCollector(lambda step: step == 0 and engine.bring_again()), engine)
    collector.collect(0, 0.0)
    assert engine.brought == [MAIN]
    collector.await_rollouts(never)
    engine.bring_again()  # as an evaluation does
    assert engine.brought == [MAIN, MAIN]


def test_weights_that_cannot_be_brought_end_the_wait() -> None:
    engine = ScriptedEngine()
    collector = ahead_of(ScriptedCollector(lambda step: step == 1 and engine.bring_again()), engine)
    collector.collect(0, 0.0)

    def fail() -> None:
        raise UserError("no server is left")

    with pytest.raises(UserError, match="no server is left"):
        collector.await_rollouts(fail)
    collector.close()
    assert engine.brought == []


def test_a_session_brings_the_weights_as_often_as_they_are_lost() -> None:
    """The second time the weights of this step were brought already, to servers that lost them since."""
    session: Any = object.__new__(TrainingSession)
    versions: list[int] = []

    def update(weights: object, version: int) -> SimpleNamespace:
        versions.append(version)
        return SimpleNamespace(seconds=0.0, num_bytes=0, num_tensors=0, attest_seconds=0.0)

    engine: Any = ScriptedEngine()
    engine.update_weights = update

    def lose_weights_twice(step: int) -> None:
        if step == 1:
            engine.bring_again()
            engine.bring_again()

    session.collector = ahead_of(ScriptedCollector(lose_weights_twice), engine)
    session.engine, session.actor, session._synced_step = engine, SimpleNamespace(weights=lambda: ()), 0
    session.collector.collect(0, 0.0)
    session.await_rollouts(1)
    # The engine alone brings them again, and only where they are missing.
    assert (versions, engine.brought) == ([1], [MAIN, MAIN])
    session.sync_weights(1)
    assert versions == [1]


def test_what_is_under_way_is_given_up_at_the_end() -> None:
    """Neither the servers' answers nor weights that servers lost are waited for."""
    engine = ScriptedEngine()
    scripted = ScriptedCollector(lambda step: step == 1 and engine.is_given_up.wait(LONG))
    collector = ahead_of(scripted, engine)
    collector.collect(0, 0.0)
    begin = time.monotonic()
    collector.close()
    assert time.monotonic() - begin < LONG / 2
    assert scripted.is_closed
    assert engine.is_given_up.is_set()
    assert collector._pending is not None
    assert not collector._pending.thread.is_alive()


@pytest.mark.parametrize("asks_before", [True, False])
def test_rollouts_that_are_given_up_get_no_weights(asks_before: bool) -> None:
    """Whether they ask for them before or after."""
    engine, go_on = ScriptedEngine(), threading.Event()
    ends: list[str] = []

    def lose_weights(step: int) -> None:
        if step == 1:
            if asks_before:
                go_on.set()
            else:
                engine.is_given_up.wait(LONG)
            try:
                engine.bring_again()
            except UserError as error:
                ends.append(error.what)
                raise

    collector = ahead_of(ScriptedCollector(lose_weights), engine)
    collector.collect(0, 0.0)
    if asks_before:
        assert go_on.wait(LONG)
        time.sleep(0.05)
    begin = time.monotonic()
    collector.close()
    assert time.monotonic() - begin < LONG / 2
    assert ends == ["the rollouts were given up, as the run ends"]
    assert engine.brought == []


def test_rollouts_that_do_not_end_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "END_SECONDS", 0.1)
    engine, go_on = ScriptedEngine(), threading.Event()
    collector = ahead_of(ScriptedCollector(lambda step: step == 1 and go_on.wait(LONG)), engine)
    collector.collect(0, 0.0)
    begin = time.monotonic()
    collector.close()
    assert 0.1 <= time.monotonic() - begin < LONG / 2
    go_on.set()


def test_where_nothing_is_under_way_nothing_is_given_up() -> None:
    """The engine may still be asked, by an evaluation."""
    engine = ScriptedEngine()
    collector = ahead_of(ScriptedCollector(), engine, num_steps=1)
    collector.close()
    collector.collect(0, 0.0)
    collector.close()
    assert not engine.is_given_up.is_set()


def test_a_run_that_is_stopped_saves_and_waits_for_no_servers() -> None:
    """What is under way is not used: neither its time nor its failure must cost the steps that were made."""
    session: Any = object.__new__(TrainingSession)
    engine: Any = ScriptedEngine()
    order: list[Any] = []
    scripted = ScriptedCollector(lambda step: step == 1 and engine.is_given_up.wait(LONG) and order.append("given up"))
    session.collector, session.total_steps = ahead_of(scripted, engine), 4
    session._is_exhausted = False
    session.engine, session._journal = engine, SimpleNamespace(note=lambda text: None, close=lambda: None)
    session._writer, session._lock = SimpleNamespace(close=lambda: None), SimpleNamespace(release=lambda: None)
    session.save = lambda step: order.append((step, session.progress()))
    engine.close = lambda: order.append("closed")
    session.collector.collect(0, 0.0)
    begin = time.monotonic()
    session.finish(1)
    assert order == [(1, {"num_drawn": 10})]
    session.close()
    assert time.monotonic() - begin < LONG / 2
    assert order[1:] == ["given up", "closed"]


def test_two_ranks_update_and_sample_at_the_same_time(tmp_path: Path) -> None:
    launch_ranks(Path(__file__).with_name("ahead_worker.py"), tmp_path / "done", log=tmp_path / "log", timeout=120)
    assert (tmp_path / "done").read_text() == "done"
