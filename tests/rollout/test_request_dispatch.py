"""Blocks of requests over servers that follow a script. Time is the event loop's own, and passes only in waiting."""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.errors import UserError
from perl_megatron.rollout.request_dispatch import MAX_TRIES, Dispatcher, Outcome, Server
from perl_megatron.rollout.server_client import ServerFailure

NEVER = 30.0
"""Seconds: the answer does not come within a test."""


class VirtualSelector(selectors.DefaultSelector):
    """Does not wait: the clock goes forward instead, however busy this machine is."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen"
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on such a clock."""

    def __init__(self) -> None:
        self._clock = VirtualSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def ready_servers(number: int) -> list[Server]:
    return [Server(f"http://server{index}", is_ready=True) for index in range(number)]


class Scripted:
    """Servers that do what ``act(server number, request)`` says: it returns seconds, or raises.

    ``asked`` has (server number, request) in the order of asking; ``cancelled`` the requests that were given up.
    """

    def __init__(self, servers: Sequence[Server], act: Callable[[int, str], float]):
        self.servers, self._act = list(servers), act
        self.asked: list[tuple[int, str]] = []
        self.cancelled: list[str] = []
        self.dead: set[int] = set()
        self.checks: list[int] = []

    async def ask(self, server: Server, request: str) -> str:
        number = self.servers.index(server)
        self.asked.append((number, request))
        try:
            await asyncio.sleep(self._act(number, request))
        except asyncio.CancelledError:
            self.cancelled.append(request)
            raise
        return f"{request} by {number}"

    async def check(self, server: Server) -> None:
        number = self.servers.index(server)
        self.checks.append(number)
        if number in self.dead:
            raise ServerFailure("it is dead")

    def run(
        self,
        blocks: Sequence[Sequence[str]],
        *,
        at_once: int = 100,
        deadline: float = NEVER,
        every: float = NEVER,
        first: int = 0,
    ) -> Outcome[str, str]:
        """All of it; no task may be left over."""

        async def whole() -> Outcome[str, str]:
            dispatcher = Dispatcher(
                self.servers,
                self.ask,
                self.check,
                blocks_at_once=at_once,
                deadline=deadline,
                check_every=every,
                first=first,
            )
            try:
                return await dispatcher.run(blocks)
            finally:
                assert asyncio.all_tasks() == {asyncio.current_task()}, "something still runs"

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(whole())

    def server_of(self, request: str) -> list[int]:
        return [number for number, each in self.asked if each == request]


def fails(*numbers: int, after: float = 0.0) -> Callable[[int, str], float]:
    """These servers fail every request, the others answer at once."""

    def act(number: int, request: str) -> float:
        if number in numbers:
            raise ServerFailure(f"{number} is broken")
        return after

    return act


def blocks_of(number: int, size: int = 2) -> list[list[str]]:
    return [[f"{block}.{place}" for place in range(size)] for block in range(number)]


def test_a_block_stays_on_one_server_and_blocks_are_spread() -> None:
    scripted = Scripted(ready_servers(3), lambda number, request: 0.01)
    outcome = scripted.run(blocks_of(6))
    by_block = {request.split(".")[0]: number for number, request in scripted.asked}
    assert all(number == by_block[request.split(".")[0]] for number, request in scripted.asked)
    assert Counter(by_block.values()) == {0: 2, 1: 2, 2: 2}
    assert sorted(request for request, _ in outcome.answers) == sorted(chain(*blocks_of(6)))
    assert all(answer == f"{request} by {by_block[request.split('.')[0]]}" for request, answer in outcome.answers)
    assert outcome.left_over == []


@pytest.mark.parametrize(("first", "order"), [(0, [0, 1, 2, 0]), (1, [1, 2, 0, 1]), (5, [2, 0, 1, 2])])
def test_first_says_who_is_asked_first(first: int, order: list[int]) -> None:
    scripted = Scripted(ready_servers(3), lambda number, request: 0.01)
    scripted.run(blocks_of(4, size=1), first=first)
    assert [number for number, _ in scripted.asked] == order


def test_the_least_busy_one_is_asked_next() -> None:
    """The first server is slow: what the second one gets rid of is filled up again."""
    scripted = Scripted(ready_servers(2), lambda number, request: 0.2 if number == 0 else 0.01)
    scripted.run(blocks_of(8, size=1), at_once=1)
    assert Counter(number for number, _ in scripted.asked) == {0: 1, 1: 7}


def test_no_server_has_more_blocks_at_once_than_allowed() -> None:
    busy: Counter[int] = Counter()
    most: Counter[int] = Counter()
    scripted = Scripted(ready_servers(2), lambda number, request: 0.01)
    ask = scripted.ask

    async def counting(server: Server, request: str) -> str:
        number = scripted.servers.index(server)
        busy[number] += 1
        most[number] = max(most[number], busy[number])
        try:
            return await ask(server, request)
        finally:
            busy[number] -= 1

    scripted.ask = counting  # type: ignore[method-assign]
    outcome = scripted.run(blocks_of(11, size=1), at_once=3)
    assert most == {0: 3, 1: 3}
    assert len(outcome.answers) == 11


def test_a_server_that_failed_gets_no_more_and_the_others_do_its_work() -> None:
    scripted = Scripted(ready_servers(2), fails(0, after=0.01))
    outcome = scripted.run(blocks_of(6), at_once=1)
    assert [number for number, _ in scripted.asked].count(0) == 2  # its first block, nothing after that
    assert len(outcome.answers) == 12
    assert scripted.servers[0].failure == "0 is broken"
    assert (scripted.servers[0].is_ready, scripted.servers[1].is_ready) == (False, True)


def test_only_what_failed_of_a_block_is_asked_again() -> None:
    def act(number: int, request: str) -> float:
        if number == 0 and request.endswith(".1"):
            raise ServerFailure("that one")
        return 0.01

    scripted = Scripted(ready_servers(2), act)
    outcome = scripted.run([["a.0", "a.1", "a.2"]])
    assert scripted.asked == [(0, "a.0"), (0, "a.1"), (0, "a.2"), (1, "a.1")]
    assert dict(outcome.answers) == {"a.0": "a.0 by 0", "a.1": "a.1 by 1", "a.2": "a.2 by 0"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_two_servers_fail_is_left_over_and_nothing_else(number: int) -> None:
    """More are not tried: it may be the request, and each try may take the deadline."""

    def act(number: int, request: str) -> float:
        if request == "bad":
            raise ServerFailure("no")
        return 0.0

    scripted = Scripted(ready_servers(number), act)
    outcome = scripted.run([["bad", "good"]])
    assert outcome.left_over == ["bad"]
    assert outcome.answers == [("good", "good by 0")]
    assert scripted.asked == [(0, "bad"), (0, "good"), (1, "bad")][: number + 1]
    assert [server.is_ready for server in scripted.servers] == [False, False, True][:number]


def test_without_servers_all_is_left_over_and_nobody_is_asked() -> None:
    servers = [Server("http://a"), Server("http://b")]
    scripted = Scripted(servers, lambda number, request: 0.0)
    outcome = scripted.run(blocks_of(2))
    assert (outcome.answers, sorted(outcome.left_over), scripted.asked) == ([], sorted(chain(*blocks_of(2))), [])


def test_nothing_to_ask() -> None:
    outcome = Scripted(ready_servers(1), lambda number, request: 0.0).run([])
    assert (outcome.answers, outcome.left_over) == ([], [])


def test_a_late_answer_is_not_waited_for_and_asked_of_another_one() -> None:
    scripted = Scripted(ready_servers(2), lambda number, request: NEVER if number == 0 else 0.0)
    outcome = scripted.run(blocks_of(2, size=1), deadline=0.1, at_once=1)
    assert scripted.servers[0].failure == "it did not answer a request for rollouts within 0.1 s"
    assert scripted.cancelled == [request for number, request in scripted.asked if number == 0]
    assert sorted(request for request, _ in outcome.answers) == ["0.0", "1.0"]
    assert all(answer.endswith("by 1") for _, answer in outcome.answers)


def test_requests_to_a_dead_server_are_given_up_long_before_their_deadline() -> None:
    scripted = Scripted(ready_servers(2), lambda number, request: NEVER if number == 0 else 0.05)
    scripted.dead = {0}
    outcome = scripted.run(blocks_of(3, size=2), every=0.02)
    assert scripted.servers[0].failure == "it is dead"
    assert len(scripted.cancelled) == 4
    assert len(outcome.answers) == 6
    assert outcome.left_over == []


def test_only_busy_servers_are_checked_and_a_live_one_is_left_in_peace() -> None:
    scripted = Scripted(ready_servers(2), lambda number, request: 0.2)
    outcome = scripted.run([["slow"]], every=0.02)
    assert len(scripted.checks) > 2
    assert set(scripted.checks) == {0}
    assert outcome.answers == [("slow", "slow by 0")]


def test_a_server_that_refuses_the_check_counts_as_dead() -> None:
    """Status 401 or 404 of its health: whatever answers there, it is not the server that was asked."""
    scripted = Scripted(ready_servers(2), lambda number, request: NEVER if number == 0 else 0.0)

    async def refuse(server: Server) -> None:
        raise UserError("there is no such route")

    scripted.check = refuse  # type: ignore[method-assign]
    outcome = scripted.run([["a"]], every=0.02, deadline=5.0)
    assert "no such route" in scripted.servers[0].failure
    assert outcome.answers == [("a", "a by 1")]


def test_a_wrong_request_ends_the_run_and_the_others_are_given_up() -> None:
    """Those of its own block too."""

    def act(number: int, request: str) -> float:
        if request == "wrong":
            raise UserError("no server takes this")
        return NEVER

    scripted = Scripted(ready_servers(2), act)
    with pytest.raises(UserError, match="no server takes this"):
        scripted.run([["same block", "wrong"], ["other block"]])
    assert sorted(scripted.cancelled) == ["other block", "same block"]
    assert all(server.is_ready for server in scripted.servers)


OUTCOMES = st.sampled_from(["fast", "fast", "slow", "fails", "fails slowly", "hangs"])
SECONDS = {"fast": 0.0, "slow": 0.004, "fails": 0.0, "fails slowly": 0.002, "hangs": NEVER}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_and_nothing_comes_twice(data: st.DataObject) -> None:
    """Whatever servers do, each request is answered once or was failed by two servers, or all that could be asked."""
    servers = ready_servers(data.draw(st.integers(1, 4), "servers"))
    for server in servers:
        server.is_ready = data.draw(st.sampled_from([True, True, True, False]), f"{server.address} is ready")
    ready = [number for number, server in enumerate(servers) if server.is_ready]
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=12), "block sizes")
    blocks = [[f"{block}.{place}" for place in range(size)] for block, size in enumerate(sizes)]
    requests = [request for block in blocks for request in block]
    script = {
        (number, request): data.draw(OUTCOMES, f"{request} on {number}") for number in ready for request in requests
    }
    scripted = Scripted(servers, lambda number, request: 0.0)

    async def ask(server: Server, request: str) -> str:
        number = servers.index(server)
        scripted.asked.append((number, request))
        kind = script[number, request]
        await asyncio.sleep(SECONDS[kind])
        if kind.startswith("fails"):
            raise ServerFailure(kind)
        return f"{request} by {number}"

    scripted.ask = ask  # type: ignore[method-assign]
    outcome = scripted.run(
        blocks,
        at_once=data.draw(st.integers(1, 4), "blocks at once"),
        deadline=0.02,
        first=data.draw(st.integers(0, 5), "first"),
    )
    answered = [request for request, _ in outcome.answers]
    assert sorted([*answered, *outcome.left_over]) == sorted(requests)
    assert max(Counter(scripted.asked).values(), default=1) == 1
    for request, answer in outcome.answers:
        number = scripted.server_of(request)[-1]  # earlier ones failed it
        assert answer == f"{request} by {number}"
        assert script[number, request] in ("fast", "slow")
    assert max(Counter(request for _, request in scripted.asked).values(), default=0) <= MAX_TRIES
    for request in outcome.left_over:
        assert len(scripted.server_of(request)) == MAX_TRIES or not any(server.is_ready for server in servers)
        assert all(script[number, request] not in ("fast", "slow") for number in scripted.server_of(request))
    failed = {number for number, server in enumerate(servers) if number in ready and not server.is_ready}
    assert failed == {number for number, request in scripted.asked if script[number, request] not in ("fast", "slow")}
