"""How one request becomes a reply, with an endpoint that may know less than OpenAI's own.

What an endpoint turns out not to know is remembered: `response_format` (then the prompt says what to write),
`max_tokens` (newer hosted models call it `max_completion_tokens`). Endpoints that give fewer samples than were asked
for are asked for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from perl_megatron.chat.connection import Completion, Connection, NotAnswered, Refused
from perl_megatron.chat.json_reply import correction, find_document, instruction, response_format
from perl_megatron.chat.messages import ChatReply, ChatRequest

Wire = list[dict[str, Any]]

_SHOWN_CHARACTERS = 4000
"""Of a reply that is not valid, so much is shown to the model that is to correct it."""


@dataclass
class _Heard:
    """What came back so far for one request."""

    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def reply(self, error: str | None = None, *, is_lasting: bool = False) -> ChatReply:
        has_reply = error is None
        return ChatReply(
            texts=tuple(self.texts) if has_reply else (),
            finish_reasons=tuple(self.finish_reasons) if has_reply else (),
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=self.num_completion_tokens,
            cached=False,
            error=error,
            error_is_lasting=is_lasting,
        )


@dataclass(frozen=True)
class _Dialect:
    """How an endpoint wants to be asked."""

    limit_key: str = "max_tokens"
    schema_in_prompt: bool = False

    def after(self, refusal: Refused, request: ChatRequest) -> _Dialect | None:
        """What to try after a refusal; None where it was about the request itself."""
        if refusal.parameter == self.limit_key == "max_tokens":
            return replace(self, limit_key="max_completion_tokens")
        if request.schema is not None and not self.schema_in_prompt:
            return replace(self, schema_in_prompt=True)
        return None

    def body(self, request: ChatRequest, messages: Wire) -> tuple[Wire, dict[str, Any]]:
        """Messages and settings as they are sent."""
        settings: dict[str, Any] = {
            self.limit_key: request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "n": request.num_samples,
        }
        if request.seed is not None:
            settings["seed"] = request.seed
        if request.schema is None:
            return messages, settings
        if self.schema_in_prompt:
            return _with_instruction(messages, instruction(request.schema)), settings
        return messages, settings | {"response_format": response_format(request.schema, request.schema_name)}


class Conversation:
    """Asks, re-asks where a reply is no valid JSON, and knows what the endpoint does not understand."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._dialect = _Dialect()

    async def reply(self, request: ChatRequest, messages: Wire) -> ChatReply:
        """The reply to a request, whose messages are ready to be sent; its error where there is none. UserError where
        no request can be answered."""
        heard = _Heard()
        try:
            while len(heard.texts) < request.num_samples:
                await self._hear(request, messages, heard)
            if request.schema is not None:
                await self._make_valid(request, messages, heard)
        except Refused as error:
            return heard.reply(str(error), is_lasting=True)
        except NotAnswered as error:
            return heard.reply(str(error), is_lasting=error.is_lasting)
        return heard.reply()

    async def _hear(self, request: ChatRequest, messages: Wire, heard: _Heard) -> None:
        """Add as many samples as the endpoint gives at once, which is at least one."""
        num_missing = request.num_samples - len(heard.texts)
        seed = None if request.seed is None else request.seed + len(heard.texts)
        completion = await self._complete(replace(request, num_samples=num_missing, seed=seed), messages)
        if completion.usage is not None:
            heard.num_prompt_tokens += completion.usage.prompt_tokens
            heard.num_completion_tokens += completion.usage.completion_tokens
        if not completion.choices:
            raise NotAnswered("the endpoint answered with no reply")
        for choice in completion.choices[:num_missing]:
            if choice.message.refusal or choice.finish_reason == "content_filter":
                reason = choice.message.refusal or "content filter"
                raise NotAnswered(f"the endpoint refuses to reply: {reason}", is_lasting=True)
            heard.texts.append(choice.message.content or "")
            heard.finish_reasons.append(choice.finish_reason or "")

    async def _make_valid(self, request: ChatRequest, messages: Wire, heard: _Heard) -> None:
        """Put the JSON document of each text in its place; a text without one is asked for once more."""
        assert request.schema is not None
        for index, text in enumerate(heard.texts):
            document, problem = find_document(text, request.schema)
            if problem is not None:
                said = {"role": "assistant", "content": text[:_SHOWN_CHARACTERS]}
                asked = {"role": "user", "content": correction(problem)}
                again = _Heard()
                try:
                    await self._hear(replace(request, num_samples=1), [*messages, said, asked], again)
                finally:
                    heard.num_prompt_tokens += again.num_prompt_tokens
                    heard.num_completion_tokens += again.num_completion_tokens
                document, problem = find_document(again.texts[0], request.schema)
                if problem is not None:
                    cut = " (it was cut at max_tokens)" if again.finish_reasons[0] == "length" else ""
                    raise NotAnswered(f"no valid JSON, asked twice: {problem}{cut}", is_lasting=True)
                heard.finish_reasons[index] = again.finish_reasons[0]
            heard.texts[index] = document

    async def _complete(self, request: ChatRequest, messages: Wire) -> Completion:
        known = dialect = self._dialect
        while True:
            try:
                completion = await self._connection.complete(*dialect.body(request, messages))
            except Refused as refusal:
                simpler = dialect.after(refusal, request)
                if simpler is None:
                    raise
                dialect = simpler
            else:
                if dialect != known:
                    self._dialect = dialect
                return completion


def _with_instruction(messages: Wire, text: str) -> Wire:
    """The messages with ``text`` at the end of the last one, which is the user's."""
    *earlier, last = messages
    content = last["content"]
    longer = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*earlier, {**last, "content": longer}]
