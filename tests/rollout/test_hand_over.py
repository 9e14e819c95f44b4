"""Two threads and one place between them. Nobody waits for a dead one."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from perl_megatron.rollout.hand_over import GivenUp, HandOver

LONG = 20.0
"""Seconds that no test may need."""


def in_thread(action: Callable[[], object]) -> Future[object]:
    """The action's result, or its error."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_everything_comes_once_in_order_then_the_end() -> None:
    hand_over = HandOver[int]()
    taken = in_thread(lambda: list(hand_over))
    assert all(hand_over.put(number, seconds=LONG) for number in range(1000))
    hand_over.complete()
    assert taken.result(LONG) == list(range(1000))
    assert (hand_over.is_given_up, hand_over.reason) == (False, None)
    hand_over.check()


def test_what_lies_there_when_all_is_complete_still_comes() -> None:
    hand_over = HandOver[str]()
    hand_over.put("last", seconds=0)
    hand_over.complete()
    assert list(hand_over) == ["last"]


def test_only_one_item_lies_between_and_a_put_waits_until_it_is_taken() -> None:
    hand_over = HandOver[int]()
    assert hand_over.put(1, seconds=0)
    second = in_thread(lambda: hand_over.put(2, seconds=LONG))
    time.sleep(0.1)
    assert not second.done()
    items = iter(hand_over)
    assert next(items) == 1
    assert second.result(LONG) is True
    assert not hand_over.put(3, seconds=0)  # 2 still lies there
    assert next(items) == 2
    assert hand_over.put(3, seconds=0)


def test_a_put_gives_up_after_its_seconds_and_the_item_is_not_there() -> None:
    hand_over = HandOver[int]()
    hand_over.put(1, seconds=0)
    begin = time.monotonic()
    assert not hand_over.put(2, seconds=0.2)
    assert 0.2 <= time.monotonic() - begin < LONG / 2
    assert not hand_over.put(2, seconds=-1)
    hand_over.complete()
    assert list(hand_over) == [1]


def test_a_put_into_an_empty_place_needs_no_time() -> None:
    assert HandOver[int]().put(1, seconds=-1)


def test_the_producer_stops_waiting_when_the_consumer_gives_up() -> None:
    hand_over = HandOver[int]()
    hand_over.put(1, seconds=0)
    waiting = in_thread(lambda: hand_over.put(2, seconds=LONG))
    time.sleep(0.05)
    begin = time.monotonic()
    hand_over.give_up("it is dead")
    assert waiting.result(LONG) is False
    assert time.monotonic() - begin < LONG / 2
    assert hand_over.is_given_up
    assert not hand_over.put(3, seconds=0)


def test_the_consumer_stops_waiting_when_the_producer_gives_up() -> None:
    hand_over = HandOver[int]()
    taken = in_thread(lambda: list(hand_over))
    time.sleep(0.05)
    hand_over.give_up("it is dead")
    with pytest.raises(GivenUp, match=r"^it is dead$"):
        taken.result(LONG)


@pytest.mark.parametrize("is_complete", [False, True])
def test_what_lies_between_is_dropped_when_one_side_gives_up(is_complete: bool) -> None:
    """A consumer that would go on with it would take half of an update for a whole one."""
    hand_over = HandOver[int]()
    hand_over.put(1, seconds=0)
    if is_complete:
        hand_over.complete()
    hand_over.give_up("it is dead")
    with pytest.raises(GivenUp, match=r"^it is dead$"):
        list(hand_over)


def test_the_first_reason_stays() -> None:
    """What follows is often a consequence of it."""
    hand_over = HandOver[int]()
    hand_over.give_up("it is dead")
    hand_over.give_up("the stream broke off")
    assert (hand_over.is_given_up, hand_over.reason) == (True, "it is dead")
    with pytest.raises(GivenUp, match=r"^it is dead$"):
        hand_over.check()


def test_one_that_waits_for_the_other_to_give_up_is_told_at_once() -> None:
    hand_over = HandOver[int]()
    assert not hand_over.wait_given_up(0.05)
    waiting = in_thread(lambda: hand_over.wait_given_up(LONG))
    time.sleep(0.05)
    begin = time.monotonic()
    hand_over.give_up("it is dead")
    assert waiting.result(LONG) is True
    assert time.monotonic() - begin < LONG / 2
    assert hand_over.wait_given_up(-1)


def test_what_is_dropped_takes_no_memory() -> None:
    """It may be the largest weight, and the one that gave up may hang on for long."""

    class Weight:
        pass

    weight = Weight()
    seen = weakref.ref(weight)
    hand_over = HandOver[Weight]()
    hand_over.put(weight, seconds=0)
    del weight
    assert seen() is not None
    hand_over.give_up("it is dead")
    assert seen() is None
