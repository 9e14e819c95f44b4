"""One endpoint, spoken to through the openai library, which tries again what may pass and pauses in between.

Three kinds of failure are told apart: what no retry mends (a wrong key, no such model, nobody there) is a
``UserError``; what the endpoint finds wrong with this request is ``Refused``; all else is ``NotAnswered``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar, cast

import openai
from pydantic import BaseModel, ValidationError

from perl_megatron.config.endpoint_section import EndpointConfig
from perl_megatron.errors import UserError
from perl_megatron.runtime.addresses import host_of, is_loopback
from perl_megatron.runtime.key_file import read_key

Form = TypeVar("Form", bound=BaseModel)
Call = Callable[[], Awaitable[Any]]

CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 120.0
"""Seconds: the longest pause that an endpoint may ask for (openai's bound on `Retry-After`)."""
NO_KEY = "none"
"""What is sent as the key where there is none: the library demands one."""
_SHOWN_CHARACTERS = 500


class Refused(Exception):
    """The endpoint finds something wrong with this request. ``parameter`` names what, where the endpoint does."""

    def __init__(self, reason: str, parameter: str | None):
        super().__init__(reason)
        self.parameter = parameter


class NotAnswered(Exception):
    """No usable answer, after all retries. ``is_lasting`` where the same request would end so again."""

    def __init__(self, reason: str, *, is_lasting: bool = False):
        super().__init__(reason)
        self.is_lasting = is_lasting


class _Said(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Said
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Completion(BaseModel):
    """The answer of `/v1/chat/completions`, as far as it is used."""

    choices: list[_Choice]
    usage: _Usage | None = None


class _Listed(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Listed]


class Connection:
    """An endpoint. To be used in one event loop, by any number of tasks.

    Raises ``UserError`` for an address or a key that cannot be used; nothing is sent yet.
    """

    def __init__(self, config: EndpointConfig):
        try:
            host = host_of(config.url)
        except ValueError as error:
            raise UserError(
                str(error), where=f"endpoint.url = {config.url!r}", fix="set endpoint.url=http://host:8000/v1"
            ) from error
        self._config = config
        self._key = read_key(
            config.api_key_file, "endpoint.api_key_file", fix="write the endpoint's key into the first line of {file}"
        )
        self._has_answered = False
        self._model = config.model
        self._asking_for_models = asyncio.Lock()
        timeout = openai.Timeout(config.deadline, connect=min(config.deadline, CONNECT_SECONDS))
        self._client = openai.AsyncOpenAI(
            api_key=self._key or NO_KEY,
            base_url=config.url,
            timeout=timeout,
            max_retries=config.retries,
            # A proxy of the environment leads to hosted endpoints, never to this machine.
            http_client=openai.DefaultAsyncHttpxClient(timeout=timeout, trust_env=not is_loopback(host)),
        )
        # What the environment holds for another endpoint is not this one's business.
        self._client.organization = self._client.project = None

    async def model(self) -> str:
        """The model that is asked: the config's, or the only one that the endpoint lists."""
        async with self._asking_for_models:
            if not self._model:
                listed = await self._checked(_Models, self._client.models.with_raw_response.list)
                names = [entry.id for entry in listed.data]
                if len(names) != 1:
                    raise UserError(
                        f"the endpoint lists {len(names)} models: {', '.join(names[:20])}",
                        where=f"endpoint.url = {self._config.url}",
                        fix="say which one by endpoint.model",
                    )
                self._model = names[0]
        return self._model

    async def complete(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> Completion:
        """Send one request: `messages` and all other `settings` of its body. Raises UserError, Refused or
        NotAnswered."""
        create = self._client.chat.completions.with_raw_response.create
        call = partial(create, model=await self.model(), messages=cast(Any, messages), extra_body=settings)
        return await self._checked(Completion, call)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def _checked(self, form: type[Form], call: Call) -> Form:
        """The answer to a call as a ``form``. What is none is asked again: it may be a gateway's page, or cut off."""
        problem = ""
        for _ in range(self._config.retries + 1):
            answer = await self._answer(call)
            try:
                return form.model_validate_json(answer)
            except ValidationError as error:
                first = error.errors(include_url=False, include_context=False, include_input=False)[0]
                problem = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        raise NotAnswered(f"the answer is not one of an OpenAI-compatible endpoint: {problem}")

    async def _answer(self, call: Call) -> bytes:
        config = self._config
        # The library's timeout is one between bytes; an answer that trickles in has an end too.
        seconds = (config.retries + 1) * config.deadline + config.retries * LONGEST_PAUSE
        try:
            async with asyncio.timeout(seconds):
                answer = await call()
        except (openai.APITimeoutError, TimeoutError) as error:
            raise NotAnswered(f"no answer within {config.deadline:g} s, in {config.retries + 1} tries") from error
        except openai.APIConnectionError as error:
            reason = f"no connection: {error.__cause__ or error}"
            if not self._has_answered:
                raise self._unmendable(reason, "start the endpoint, or correct endpoint.url") from error
            raise NotAnswered(reason) from error
        except openai.APIStatusError as error:
            self._has_answered = True
            raise self._explained(error) from error
        self._has_answered = True
        return answer.content

    def _explained(self, error: openai.APIStatusError) -> Exception:
        said = self._without_key(error.message)[:_SHOWN_CHARACTERS]
        if error.status_code in (401, 403):
            return self._unmendable(said, "put the endpoint's key into the first line of endpoint.api_key_file")
        if error.status_code == 404:
            fix = "check endpoint.model, and endpoint.url: it usually ends in /v1"
            return self._unmendable(said, fix)
        if error.status_code == 429 and error.code == "insufficient_quota":
            return self._unmendable(said, "the account has nothing left to spend")
        if error.status_code in (400, 413, 422):
            return Refused(said, error.param)
        return NotAnswered(said)

    def _unmendable(self, said: str, fix: str) -> UserError:
        where = f"endpoint.url = {self._config.url}"
        if self._model:
            where += f", model {self._model}"
        return UserError(f"the endpoint cannot be used: {self._without_key(said)}", where=where, fix=fix)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text
