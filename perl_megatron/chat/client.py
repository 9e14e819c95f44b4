"""Asks an OpenAI-compatible endpoint many things at once, and keeps what it said."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

from perl_megatron.chat.connection import Connection
from perl_megatron.chat.content import request_digest, wire_messages
from perl_megatron.chat.conversation import Conversation
from perl_megatron.chat.json_reply import json_schema
from perl_megatron.chat.messages import ChatReply, ChatRequest
from perl_megatron.chat.reply_cache import ReplyCache
from perl_megatron.config.endpoint_section import EndpointConfig

LOOK_AHEAD = 4
"""Requests that are taken from the caller before the first of them is answered, as a multiple of the concurrency: a
slow one does not hold up the others."""


class ChatClient:
    """Asks one endpoint, from a thread of its own. A context manager; ``ask`` may be called from several threads.

    Raises:
        UserError: the endpoint's address, its key or the cache's folder cannot be used. Nothing is sent yet.
    """

    def __init__(self, config: EndpointConfig):
        self._cache = None if config.cache is None else ReplyCache(config.cache)
        self._connection = Connection(config)
        self._conversation = Conversation(self._connection)
        self._window = LOOK_AHEAD * config.concurrency
        self._slots = asyncio.Semaphore(config.concurrency)
        self._under_way: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat client", daemon=True)
        self._thread.start()
        self._closed = False

    def ask(self, requests: Iterable[ChatRequest]) -> Iterator[ChatReply]:
        """The replies, in the order of the requests, which are taken as they are needed.

        ``endpoint.concurrency`` requests are under way at once; replies that come early wait (a few times as many, no
        more). What the cache holds is not asked. An iterator that is left early abandons what is under way.

        Raises:
            UserError: no request can be answered (a wrong key, no such model, nobody there), or an image cannot be
                read. A request that alone was not answered has its reason in ``ChatReply.error``.
        """
        waiting: deque[Future[ChatReply]] = deque()
        try:
            for request in requests:
                assert not self._closed, "the client is closed"
                waiting.append(asyncio.run_coroutine_threadsafe(self._reply(request), self._loop))
                while waiting and (len(waiting) >= self._window or waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Abandon what is under way, and close all connections."""
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.close()
        await asyncio.get_running_loop().shutdown_default_executor()

    async def _reply(self, request: ChatRequest) -> ChatReply:
        async with self._slots:
            if self._cache is None or (request.temperature > 0 and request.seed is None):
                return await self._ask(request)
            digest = await self._digest(request)
            # The same request from another task waits, and then finds the reply in the cache.
            async with self._under_way.setdefault(digest, asyncio.Lock()):
                known = await asyncio.to_thread(self._cache.get, digest)
                if known is not None:
                    return known
                reply = await self._ask(request)
                if reply.error is None:
                    await asyncio.to_thread(self._cache.put, digest, reply)
                return reply

    async def _digest(self, request: ChatRequest) -> str:
        schema: Any = None if request.schema is None else json_schema(request.schema)
        return await asyncio.to_thread(request_digest, request, await self._connection.model(), schema)

    async def _ask(self, request: ChatRequest) -> ChatReply:
        messages = await asyncio.to_thread(wire_messages, request.messages)
        return await self._conversation.reply(request, messages)
