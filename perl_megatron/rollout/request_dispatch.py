"""Requests over several servers: the least busy one is asked, and what a server fails to answer another one is asked.

Requests come in blocks that share images (the views of a record); a block goes to one server, where its images are then
encoded once. A server that fails gets no further requests. What no server answered is left over, and may be tried again
once servers are back: nothing is lost, and an answer that comes too late is not read, so nothing is counted twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from perl_megatron.errors import UserError
from perl_megatron.rollout.server_client import ServerFailure

Request = TypeVar("Request")
Answer = TypeVar("Answer")


MAX_TRIES = 2
"""Servers that a request is sent to before it is left over: other processes wait, and each may take the deadline."""


@dataclass
class Server:
    """One server as this process knows it."""

    address: str
    is_ready: bool = False
    """Whether it can be asked for rollouts: it is there and has the weights."""
    failure: str = "it was not asked yet"
    """What was wrong the last time, while it is not ready."""

    def fail(self, reason: str) -> None:
        """Ask it nothing more until it is found to be well."""
        self.is_ready, self.failure = False, reason


@dataclass
class Outcome(Generic[Request, Answer]):
    """What became of some requests."""

    answers: list[tuple[Request, Answer]] = field(default_factory=list)
    left_over: list[Request] = field(default_factory=list)
    """Those that every server that was asked failed to answer, ``MAX_TRIES`` of them at most."""


class Dispatcher(Generic[Request, Answer]):
    """Sends requests to servers.

    Args:
        servers: all of them; only those that are ready are asked.
        ask: sends one request to one server; ServerFailure where it is not answered.
        check: whether a server still lives; ServerFailure or UserError where it does not, or is another one. Called
            again and again while it is busy.
        blocks_at_once: blocks that a server is sent before one of them is answered.
        deadline: seconds for each request.
        first: the server that is asked first where all are equally busy; each process has another one.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        ask: Callable[[Server, Request], Awaitable[Answer]],
        check: Callable[[Server], Awaitable[None]],
        *,
        blocks_at_once: int,
        deadline: float,
        check_every: float,
        first: int = 0,
    ):
        self._servers = [*servers[first % len(servers) :], *servers[: first % len(servers)]]
        self._ask, self._check = ask, check
        self._blocks_at_once, self._deadline, self._check_every = blocks_at_once, deadline, check_every
        self._busy = {server.address: 0 for server in servers}
        self._running: dict[str, set[asyncio.Task[Answer]]] = {server.address: set() for server in servers}

    async def run(self, blocks: Sequence[Sequence[Request]]) -> Outcome[Request, Answer]:
        """Ask for everything; returns when each request is answered or left over.

        Raises:
            UserError: from ``ask``: the request itself is wrong. The others are given up.
        """
        self._changed = asyncio.Condition()
        outcome: Outcome[Request, Answer] = Outcome()
        watch = [asyncio.ensure_future(self._watch(server)) for server in self._servers]
        work = [asyncio.ensure_future(self._run_block(block, outcome)) for block in blocks]
        try:
            await asyncio.gather(*work)
        finally:
            for task in (*watch, *work):
                task.cancel()
            await asyncio.gather(*watch, *work, return_exceptions=True)
        return outcome

    async def _run_block(self, block: Sequence[Request], outcome: Outcome[Request, Answer]) -> None:
        """The whole block on one server, then what failed there on another, until none is left."""
        waiting, tried = list(block), set[str]()
        while waiting:
            server = await self._take_server(tried) if len(tried) < MAX_TRIES else None
            if server is None:
                outcome.left_over += waiting
                return
            tried.add(server.address)
            asking = [asyncio.ensure_future(self._ask_one(server, request)) for request in waiting]
            try:
                results = await asyncio.gather(*asking)
            finally:
                for task in asking:  # where one raised, the others would go on
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
                await self._give_back(server)
            pairs = list(zip(waiting, results, strict=True))
            outcome.answers += [(request, result[0]) for request, result in pairs if result is not None]
            waiting = [request for request, result in pairs if result is None]

    async def _ask_one(self, server: Server, request: Request) -> tuple[Answer] | None:
        """The answer, or None: the server then gets no further requests."""
        task = asyncio.ensure_future(self._ask(server, request))
        self._running[server.address].add(task)
        try:
            async with asyncio.timeout(self._deadline):
                return (await task,)
        except TimeoutError:
            await self._fail(server, f"it did not answer a request for rollouts within {self._deadline:g} s")
        except ServerFailure as failure:
            await self._fail(server, str(failure))
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if this is None or this.cancelling():
                raise  # the whole run is given up; else the watch has given this server up
        finally:
            self._running[server.address].discard(task)
            task.cancel()
        return None

    async def _take_server(self, tried: set[str]) -> Server | None:
        """The least busy server that was not tried yet, when one has room; None where no such server is ready."""
        async with self._changed:
            while True:
                ready = [server for server in self._servers if server.is_ready and server.address not in tried]
                if not ready:
                    return None
                server = min(ready, key=lambda each: self._busy[each.address])
                if self._busy[server.address] < self._blocks_at_once:
                    self._busy[server.address] += 1
                    return server
                await self._changed.wait()

    async def _give_back(self, server: Server) -> None:
        async with self._changed:
            self._busy[server.address] -= 1
            self._changed.notify_all()

    async def _watch(self, server: Server) -> None:
        """Give up all requests to a server that does not live."""
        while True:
            await asyncio.sleep(self._check_every)
            running = self._running[server.address]
            if not running:
                continue
            try:
                await self._check(server)
            except (ServerFailure, UserError) as failure:
                await self._fail(server, str(failure))
                for task in list(running):
                    task.cancel()

    async def _fail(self, server: Server, reason: str) -> None:
        server.fail(reason)
        async with self._changed:
            self._changed.notify_all()
