"""Asks servers for the rollouts of views, over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.rollout.dispatch import Dispatcher, Outcome, Server
from perl_megatron.rollout.engine import Sampling
from perl_megatron.rollout.server_answers import GENERATE, AnswerReader, request_body
from perl_megatron.rollout.server_client import ServerFailure, describe, headers, refuse
from perl_megatron.types import EncodedPrompt, Rollout, View

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
        name, version = weights
        self._reader = AnswerReader(encoder, sampling, version_of=lambda given: version if given == name else None)
        # The deadlines are the dispatcher's. Not through a proxy of the environment: this stays in the cluster.
        self._options = {
            "headers": headers(key),
            "trust_env": False,
            "timeout": httpx.Timeout(None, connect=config.health_deadline),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        }

    async def run(
        self, servers: Sequence[Server], blocks: Sequence[Sequence[Question]], *, blocks_at_once: int, first: int
    ) -> Outcome[Question, list[Rollout]]:
        """Ask for all blocks: see ``Dispatcher``. UserError for a request that a server refuses."""
        async with httpx.AsyncClient(**self._options) as self._http:  # type: ignore[arg-type]
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
        body = request_body(self._encoder, question.prompt, self._sampling, question.seed)
        try:
            reply = await self._http.post(f"{server.address}/{GENERATE}", json=body)
            if reply.status_code == 400:
                raise UserError(
                    f"the server {server.address} refuses the request: {reply.text[:500]}",
                    where=f"record {question.view.record_id}",
                    fix="was it started with the config of this run? (`perl-megatron serve`)",
                )
            refuse(reply, GENERATE)
            answer = reply.json()
        except (httpx.HTTPError, OSError) as error:
            raise ServerFailure(f"a request for rollouts: {describe(error)}") from error
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise ServerFailure(f"its answer is no JSON: {error}") from error
        return self._reader.read(answer, question.view, question.prompt)

    async def _check(self, server: Server) -> None:
        seconds = self._config.health_deadline
        try:
            reply = await self._http.get(f"{server.address}/health", timeout=seconds)
        except httpx.TimeoutException as error:
            raise ServerFailure(f"it hangs: /health was not answered within {seconds:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            raise ServerFailure(f"/health: {describe(error)}") from error
        refuse(reply, "health")
