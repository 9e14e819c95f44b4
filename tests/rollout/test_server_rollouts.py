"""Work of an event loop that another thread may end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from perl_megatron.errors import UserError
from perl_megatron.rollout.server_rollouts import CancellableRun

LONG = 20.0
GIVEN_UP = "the rollouts were given up"


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


def test_the_result_as_often_as_it_is_asked_for() -> None:
    runs = CancellableRun()
    assert [runs.run(give(value)) for value in (1, 2)] == [1, 2]


@pytest.mark.parametrize("error", [UserError("a request is refused"), KeyError("a bug")])
def test_an_error_passes_and_the_next_one_runs(error: Exception) -> None:
    runs = CancellableRun()
    with pytest.raises(type(error)) as caught:
        runs.run(fail(error))
    assert caught.value is error
    assert runs.run(give(3)) == 3


def test_what_was_cancelled_before_does_not_begin() -> None:
    """Neither does anything that follows."""
    runs, begun = CancellableRun(), []

    async def work() -> None:
        begun.append(True)

    runs.cancel()
    for _ in range(2):
        with pytest.raises(UserError, match=GIVEN_UP) as caught:
            runs.run(work())
        assert caught.value.where == "rollout.max_staleness"
    assert begun == []


def test_after_the_end_of_one_the_next_is_cancelled() -> None:
    """A loop that is closed is not called any more."""
    runs = CancellableRun()
    runs.run(give(1))
    runs.cancel()
    with pytest.raises(UserError, match=GIVEN_UP):
        runs.run(give(2))


def test_another_thread_ends_what_runs() -> None:
    """What it holds open is closed."""
    runs, has_begun, is_closed = CancellableRun(), threading.Event(), threading.Event()

    async def work() -> None:
        try:
            has_begun.set()
            await asyncio.sleep(LONG)
        finally:
            is_closed.set()

    def cancel() -> None:
        has_begun.wait(LONG)
        runs.cancel()

    canceller = threading.Thread(target=cancel, daemon=True)
    canceller.start()
    begin = time.monotonic()
    with pytest.raises(UserError, match=GIVEN_UP):
        runs.run(work())
    assert time.monotonic() - begin < LONG / 2
    assert is_closed.is_set()
    canceller.join(LONG)


def test_work_in_a_thread_is_ended_from_the_main_one() -> None:
    """As the rollouts of the next step are."""
    runs, has_begun = CancellableRun(), threading.Event()
    errors: list[BaseException] = []

    async def work() -> None:
        has_begun.set()
        await asyncio.sleep(LONG)

    def run() -> None:
        try:
            runs.run(work())
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert has_begun.wait(LONG)
    runs.cancel()
    thread.join(LONG / 2)
    assert not thread.is_alive()
    assert [GIVEN_UP in str(error) for error in errors] == [True]
