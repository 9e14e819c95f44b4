"""Asks servers for the rollouts of views, over HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.rollout.engine import Sampling
from perl_megatron.rollout.request_dispatch import Dispatcher, Outcome, Server
from perl_megatron.rollout.server_answers import GENERATE, AnswerReader, ImageUrls, request_body
from perl_megatron.rollout.server_client import ServerFailure, connection, describe, refuse
from perl_megatron.types import EncodedPrompt, Rollout, View

Result = TypeVar("Result")

CHECKS = 4
"""How often a server's life is checked within `rollout.health_deadline`."""


@dataclass(frozen=True)
class Question:
    """A view to be sampled."""

    index: int
    """In the call."""
    view: View
    prompt: EncodedPrompt
    seed: int


class CancellableRun:
    """``asyncio.run`` that another thread can end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._is_cancelled = False

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of ``work``; UserError where it was cancelled, before or meanwhile."""
        try:
            return asyncio.run(self._watched(work))
        except asyncio.CancelledError as error:
            raise UserError("the rollouts were given up, as the run ends", where="rollout.max_staleness") from error

    def cancel(self) -> None:
        """End what runs, and all that would follow."""
        with self._lock:
            self._is_cancelled = True
            if self._running is not None:
                loop, task = self._running
                loop.call_soon_threadsafe(task.cancel)

    async def _watched(self, work: Coroutine[Any, Any, Result]) -> Result:
        task = asyncio.ensure_future(work)
        with self._lock:
            self._running = asyncio.get_running_loop(), task
            if self._is_cancelled:
                task.cancel()
        try:
            return await task
        finally:
            with self._lock:
                self._running = None


class RolloutRequests:
    """The requests of one process and one sampling.

    Args:
        key: what the servers demand.
        weights: (name, version) of the weights that they have to have sampled with.
    """

    def __init__(
        self,
        config: RolloutConfig,
        encoder: PromptEncoder,
        key: str | None,
        sampling: Sampling,
        *,
        weights: tuple[str, int],
    ):
        self._config, self._encoder, self._sampling = config, encoder, sampling
        self._url_of = ImageUrls(encoder)
        name, version = weights
        self._reader = AnswerReader(encoder, sampling, version_of=lambda given: version if given == name else None)
        # The deadlines are the dispatcher's.
        self._options: dict[str, Any] = {
            **connection(next(filter(_is_encrypted, config.servers), ""), key),
            "timeout": httpx.Timeout(None, connect=config.health_deadline),
        }

    async def run(
        self, servers: Sequence[Server], blocks: Sequence[Sequence[Question]], *, blocks_at_once: int, first: int
    ) -> Outcome[Question, list[Rollout]]:
        """Ask for all blocks: see ``Dispatcher``. UserError for a request that a server refuses."""
        async with httpx.AsyncClient(**self._options) as self._http:
            dispatcher = Dispatcher(
                servers,
                self._ask,
                self._check,
                blocks_at_once=blocks_at_once,
                deadline=self._config.request_deadline,
                check_every=self._config.health_deadline / CHECKS,
                first=first,
            )
            return await dispatcher.run(blocks)

    async def _ask(self, server: Server, question: Question) -> list[Rollout]:
        # In a thread: compressing images would hold up what comes back meanwhile.
        body = await asyncio.to_thread(
            request_body, self._encoder, question.prompt, self._sampling, question.seed, self._url_of
        )
        try:
            reply = await self._http.post(f"{server.address}/{GENERATE}", json=body)
            if reply.status_code == 400:
                raise UserError(
                    f"the server {server.address} refuses the request: {reply.text[:500]}",
                    where=f"record {question.view.record_id}",
                    fix="was it started with the config of this run? (`perl-megatron serve`)",
                )
            refuse(reply.status_code, reply.content, GENERATE)
            return self._reader.read(reply.json(), question.view, question.prompt)
        except (UserError, ServerFailure):
            raise
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ServerFailure(f"a request for rollouts: {describe(error)}") from error
        except Exception as error:  # an answer may hold anything
            raise ServerFailure(f"its answer cannot be read: {describe(error)}") from error

    async def _check(self, server: Server) -> None:
        seconds = self._config.health_deadline
        try:
            async with asyncio.timeout(seconds):
                reply = await self._http.get(f"{server.address}/health")
        except TimeoutError as error:
            raise ServerFailure(f"it hangs: /health was not answered within {seconds:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            raise ServerFailure(f"/health: {describe(error)}") from error
        refuse(reply.status_code, reply.content, "health")


def _is_encrypted(address: str) -> bool:
    return address.startswith("https:")
