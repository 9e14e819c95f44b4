import threading
import time

import pytest

from perl_megatron.data.wait_clock import DataWaits, WaitClock


def wait(clock: WaitClock, *kinds: str, inner: float = 0.02, outer: float = 0.01) -> None:
    """Wait ``inner`` seconds for the last kind within the others, ``outer`` for each of these."""
    kind, *others = kinds
    with clock(kind):  # type: ignore[arg-type]
        if others:
            time.sleep(outer)
            wait(clock, *others, inner=inner, outer=outer)
        else:
            time.sleep(inner)


def test_a_wait_within_a_wait_counts_once():
    clock = WaitClock()
    begin = time.perf_counter()
    wait(clock, "questions", "images")
    wait(clock, "dropped", "images")
    seconds = time.perf_counter() - begin
    waits = clock.take()
    assert 0.06 <= waits.total <= seconds
    assert 0.04 <= waits.images <= waits.total - 0.02
    assert 0.03 <= waits.dropped <= waits.total - 0.03
    assert clock.take() == DataWaits()


def test_an_error_ends_the_wait():
    clock = WaitClock()
    with pytest.raises(ValueError, match="broken"), clock("questions"), clock("images"):
        raise ValueError("broken")
    wait(clock, "questions")
    assert clock.take().images < 0.02


def test_each_thread_has_its_own_waits():
    clock = WaitClock()
    found = []
    thread = threading.Thread(target=lambda: (wait(clock, "images"), found.append(clock.take())))
    thread.start()
    thread.join()
    assert found[0].total >= 0.02
    assert clock.take() == DataWaits()


def test_parts_keep_their_share():
    waits = DataWaits(8.0, 4.0, 1.0)
    assert waits.at_most(2.0) == DataWaits(2.0, 1.0, 0.25)
    assert waits.at_most(9.0) == waits
    assert DataWaits().at_most(1.0) == DataWaits()
    assert waits + DataWaits(1.0, 1.0, 1.0, True) == DataWaits(9.0, 5.0, 2.0, True)
