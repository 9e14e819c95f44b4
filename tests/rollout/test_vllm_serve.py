"""Who may use a server's routes: an app behind the key, asked over ASGI. No server is started."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from perl_megatron.rollout.engine import vllm_obstacle
from perl_megatron.runtime import environment

VLLM = vllm_obstacle(cuda=False)
pytestmark = pytest.mark.skipif(VLLM is not None, reason=str(VLLM))

KEY = "a-key-that-is-long-enough"
PATHS = ["/v1/models", "/pause", "/collective_rpc", "/inference/v1/generate", "/metrics", "/", "/health/", "/healthy"]


class App:
    """Answers everything, and counts."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"inside"})


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def guarded(app: App) -> Iterator[Any]:
    environment.prepare_vllm_server(cuda=False)
    from perl_megatron.rollout.vllm_serve import RequireKey

    before = environment.server_key()
    environment.set_server_key(KEY)
    yield RequireKey(app)
    environment.set_server_key(before)


def ask(guarded: Any, path: str, headers: dict[str, str] | list[tuple[bytes, bytes]], method: str = "GET") -> Any:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", trust_env=False) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(request())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_the_key_opens_every_route_and_nothing_else_does(app: App, guarded: Any, path: str, method: str) -> None:
    assert ask(guarded, path, {}, method).status_code == 401
    assert app.scopes == []
    reply = ask(guarded, path, {"Authorization": f"Bearer {KEY}"}, method)
    assert (reply.status_code, reply.content, len(app.scopes)) == (200, b"inside", 1)


WRONG = [
    *("", KEY, "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer  {KEY}", f"Bearer {KEY.upper()}"),
    *(f"Basic {KEY}", f"Token {KEY}", f"Bearer {KEY} {KEY}", f"Bearer\t{KEY}"),
]


@pytest.mark.parametrize("value", WRONG)
def test_another_key_opens_nothing(app: App, guarded: Any, value: str) -> None:
    reply = ask(guarded, "/pause", {"Authorization": value}, "POST")
    assert reply.status_code == 401
    assert "key is missing or wrong" in reply.json()["error"]
    assert KEY not in reply.text
    assert app.scopes == []


def test_bytes_that_are_no_text_open_nothing(app: App, guarded: Any) -> None:
    assert ask(guarded, "/pause", [(b"authorization", b"Bearer \xff\xfe")]).status_code == 401
    assert app.scopes == []


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_whether_the_server_is_there_is_no_secret(app: App, guarded: Any, path: str) -> None:
    assert ask(guarded, path, {}).status_code == 200
    assert ask(guarded, path, {"Authorization": "Bearer wrong"}).status_code == 200


def test_the_name_of_the_scheme_may_be_written_in_small_letters(guarded: Any) -> None:
    assert ask(guarded, "/pause", {"authorization": f"bearer {KEY}"}).status_code == 200


def test_websockets_are_closed_without_the_key(app: App, guarded: Any) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(guarded(scope, receive, send))
    assert app.scopes == []
    assert sent[0]["type"].startswith("websocket.")
    assert "accept" not in sent[0]["type"]
    scope["headers"] = [(b"authorization", f"Bearer {KEY}".encode())]
    asyncio.run(guarded(scope, receive, send))
    assert len(app.scopes) == 1


def test_what_is_no_request_passes(app: App, guarded: Any) -> None:
    """The server's own start and end."""
    asyncio.run(guarded({"type": "lifespan"}, None, None))
    assert [scope["type"] for scope in app.scopes] == ["lifespan"]


def test_without_a_key_it_does_not_stand_open(guarded: Any) -> None:
    environment.set_server_key(None)
    with pytest.raises(AssertionError, match="only used with a key"):
        type(guarded)(App())
