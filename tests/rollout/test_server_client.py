"""Calls of a server, against one in a thread that answers as the test says."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from perl_megatron.rollout.server_client import Misfit, ServerClient, ServerFailure, connection, refuse
from perl_megatron.rollout.server_usage import ServerUsage

Reply = tuple[int, bytes]


class SmallServer:
    """Keeps (method, path with query, headers, body) of each request in ``seen``, and answers ``reply(path)``."""

    def __init__(self) -> None:
        self.reply: Callable[[str], Reply] = lambda path: (200, b"{}")
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.hang = threading.Event()
        self.trickle: float | None = None
        """Seconds after each byte of an answer."""
        self.closes_what_is_idle = False
        """As if a connection's second request came just when its time is over: it is closed without an answer."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            is_used = False

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def _answer(self) -> None:
                if outer.closes_what_is_idle and self.is_used:
                    self.close_connection = True
                    return
                self.is_used = True
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.seen.append((self.command, self.path, dict(self.headers), body))
                status, content = outer.reply(self.path)
                with suppress(ConnectionError):  # whoever asked has gone
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    for part in (
                        (content,) if outer.trickle is None else (content[at : at + 1] for at in range(len(content)))
                    ):
                        self.wfile.write(part)
                        outer.hang.wait(outer.trickle or 0)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.hang.set()
        self._server.shutdown()
        self._server.server_close()

    def hang_at(self, path: str) -> None:
        """Answer nothing there until the test ends."""
        self.reply = lambda asked: (self.hang.wait(20), (200, b"{}"))[1] if asked == path else (200, b"{}")


@pytest.fixture
def server() -> Iterator[SmallServer]:
    server = SmallServer()
    yield server
    server.close()


@pytest.fixture
def client(server: SmallServer) -> Iterator[ServerClient]:
    client = ServerClient(f"{server.address}/", key="a key", seconds=5.0, sync_seconds=5.0)
    yield client
    client.close()


def replies(server: SmallServer, status: int, content: bytes | str = b"") -> None:
    encoded = content.encode() if isinstance(content, str) else content
    server.reply = lambda path: (status, encoded)


def test_what_is_sent(server: SmallServer, client: ServerClient) -> None:
    replies(server, 200, '{"weight_version": "a-1"}')
    assert client.ask("weight_info") == {"weight_version": "a-1"}
    client.tell("pause", mode="abort", clear_cache="true")
    client.tell("update_weight_version", {"new_version": "é"})
    kinds = [(method, path, body) for method, path, _, body in server.seen]
    assert kinds[0] == ("GET", "/weight_info", b"")
    assert kinds[1] == ("POST", "/pause?mode=abort&clear_cache=true", b"")
    assert kinds[2][:2] == ("POST", "/update_weight_version")
    assert json.loads(kinds[2][2]) == {"new_version": "é"}
    assert all(headers["Authorization"] == "Bearer a key" for _, _, headers, _ in server.seen)


def test_without_a_key_none_is_sent(server: SmallServer) -> None:
    client = ServerClient(server.address, key=None, seconds=5.0, sync_seconds=5.0)
    assert client.ask("health") == {}
    assert "Authorization" not in server.seen[0][2]
    client.close()


def test_proxies_of_the_environment_are_passed_by(server: SmallServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and rollouts stay in the cluster."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, dead)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    client = ServerClient(server.address, key=None, seconds=5.0, sync_seconds=5.0)
    assert client.ask("health") == {}
    client.close()


def test_no_request_meets_a_connection_that_the_server_closes(server: SmallServer, client: ServerClient) -> None:
    """Not those for rollouts either. vLLM closes connections after five idle seconds."""
    server.closes_what_is_idle = True
    for _ in range(3):
        client.tell("pause")

    async def ask() -> list[int]:
        async with httpx.AsyncClient(**connection(server.address, None)) as http:
            return [(await http.get(f"{server.address}/health")).status_code for _ in range(3)]

    assert asyncio.run(ask()) == [200, 200, 200]


def test_no_content_is_none(server: SmallServer, client: ServerClient) -> None:
    replies(server, 200)
    assert client.ask("health") is None


@pytest.mark.parametrize("status", [301, 307, 400, 409, 500, 502, 503])
def test_a_status_that_is_no_success_is_a_failure(server: SmallServer, client: ServerClient, status: int) -> None:
    replies(server, status, "engine dead")
    with pytest.raises(ServerFailure, match=rf"/pause was answered with status {status}: engine dead"):
        client.tell("pause")


def test_a_wrong_key_is_the_users_to_mend(server: SmallServer, client: ServerClient) -> None:
    replies(server, 401)
    with pytest.raises(Misfit, match=r"^it does not take the key$") as caught:
        client.ask("weight_info")
    assert caught.value.error.where == "rollout.api_key_file"
    assert "the server was started with" in str(caught.value.error.fix)


@pytest.mark.parametrize("status", [403, 404])
def test_a_route_that_is_not_there_is_the_users_to_mend(server: SmallServer, client: ServerClient, status: int) -> None:
    replies(server, status, "Not Found")
    with pytest.raises(Misfit, match=r"^it has no route /collective_rpc: Not Found$") as caught:
        client.call("perl_describe")
    assert (caught.value.error.what, caught.value.error.where) == (str(caught.value), "rollout.servers")
    assert "perl-megatron serve" in str(caught.value.error.fix)


@pytest.mark.parametrize("status", [200, 204, 299])
def test_a_success_is_not_refused(status: int) -> None:
    refuse(status, b"whatever", "health")


def test_a_failure_that_is_no_misfit_may_pass_by_and_quotes_little_of_any_bytes() -> None:
    """It is not the user's to mend."""
    with pytest.raises(ServerFailure) as caught:
        refuse(500, b"\xff" + b"a" * 10_000, "health")
    assert not isinstance(caught.value, Misfit)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"<html>", b"{", b"\xff\xfe\xfd", b"[" * 200_000])
def test_what_is_no_json_is_a_failure(server: SmallServer, client: ServerClient, content: bytes) -> None:
    replies(server, 200, content)
    with pytest.raises(ServerFailure, match="/health"):
        client.ask("health")


def test_an_answer_that_trickles_has_the_same_deadline(server: SmallServer) -> None:
    """Each part comes soon, all of it never."""
    server.trickle = 0.05
    replies(server, 200, b" " * 400 + b"{}")
    client = ServerClient(server.address, key=None, seconds=0.3, sync_seconds=20.0)
    begin = time.monotonic()
    with pytest.raises(ServerFailure, match=r"/health was not answered within 0\.3 s"):
        client.ask("health")
    assert 0.3 <= time.monotonic() - begin < 5
    client.close()


@pytest.mark.parametrize(("address", "is_encrypted"), [("http://a", False), ("https://a", True)])
def test_the_options_of_a_connection(address: str, is_encrypted: bool) -> None:
    """The certificates of the environment count, its proxies do not."""
    options = connection(address, "a key")
    assert isinstance(options.pop("verify", None), ssl.SSLContext) == is_encrypted
    assert options.pop("limits").max_keepalive_connections == 0
    assert options == {"headers": {"Authorization": "Bearer a key"}, "trust_env": False}
    assert connection("http://a", None)["headers"] == {}


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    client = ServerClient(f"http://127.0.0.1:{port}", key=None, seconds=5.0, sync_seconds=5.0)
    with pytest.raises(ServerFailure, match=r"/health: ConnectError"):
        client.ask("health")
    client.close()


CALLS: dict[str, Callable[[ServerClient], object]] = {
    "health": lambda client: client.ask("health"),
    "resume": lambda client: client.tell("resume"),
    "metrics": lambda client: client.metric("hits_total"),
    "start_weight_update": lambda client: client.start_weight_update(),
    "update_weights": lambda client: client.update_weights({}),
    "collective_rpc": lambda client: client.call("perl_conclude"),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_kind_of_call_has_its_deadline(server: SmallServer, name: str) -> None:
    """One that moves weights has the longer one, or what it is given."""
    is_sync = list(CALLS).index(name) > 2
    own, sync = (20.0, 0.2) if is_sync else (0.2, 20.0)
    client = ServerClient(server.address, key=None, seconds=own, sync_seconds=sync)
    server.hang_at(f"/{name}")
    begin = time.monotonic()
    with pytest.raises(ServerFailure, match=rf"/{name} was not answered within 0\.2 s"):
        CALLS[name](client)
    assert 0.2 <= time.monotonic() - begin < 5
    server.hang_at("/y")
    with pytest.raises(ServerFailure, match=r"/y was not answered within 0\.1 s"):
        client.ask("y", seconds=0.1)
    server.hang_at("/metrics")
    with pytest.raises(ServerFailure, match=r"/metrics was not answered within 0\.1 s"):
        client.metric("hits_total", seconds=0.1)
    client.close()


def test_a_method_of_the_workers(server: SmallServer, client: ServerClient) -> None:
    replies(server, 200, '{"results": [[1], [2]]}')
    assert client.call("perl_load_folder", "/a", True) == [[1], [2]]
    assert json.loads(server.seen[0][3]) == {"method": "perl_load_folder", "args": ["/a", True]}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": []}', '{"results": 1}', "null"])
def test_workers_that_answer_nothing_are_a_failure(server: SmallServer, client: ServerClient, content: str) -> None:
    replies(server, 200, content)
    with pytest.raises(ServerFailure, match="perl_describe: its workers answered"):
        client.call("perl_describe")


def test_vllms_four_calls(server: SmallServer, client: ServerClient) -> None:
    client.init_weight_transfer_engine({"a": 1})
    client.start_weight_update()
    client.update_weights({"b": 2})
    client.finish_weight_update("ignored")
    assert [(path, json.loads(body) if body else None) for _, path, _, body in server.seen] == [
        ("/init_weight_transfer_engine", {"init_info": {"a": 1}}),
        ("/start_weight_update", None),
        ("/update_weights", {"update_info": {"b": 2}}),
        ("/finish_weight_update", {}),
    ]


METRICS = """# HELP hits_total of the cache
# TYPE hits_total counter
hits_total{engine="0",model_name="a b"} 3.0
hits_total{engine="1",model_name="a b"} 4e2
hits_total_created{engine="0"} 1.7e9
hits 9.0
other_hits_total{engine="0"} 5.0
"""


def test_a_counter_is_summed_over_engines(server: SmallServer, client: ServerClient) -> None:
    replies(server, 200, METRICS)
    assert client.metric("hits_total") == 403.0
    assert client.metric("hits") == 9.0
    assert client.metric("none_total") == 0.0


@pytest.mark.parametrize("line", ["hits_total{engine=0}", "hits_total ", 'hits_total{engine="0"} many'])
def test_a_counter_that_cannot_be_read_is_a_failure(server: SmallServer, client: ServerClient, line: str) -> None:
    replies(server, 200, line)
    with pytest.raises(ServerFailure, match="/metrics"):
        client.metric("hits_total")


def test_usage_over_http(server: SmallServer, client: ServerClient) -> None:
    def reply(path: str) -> Reply:
        if path == "/metrics":
            return 200, b'vllm:prefix_cache_hits_total{engine="0"} 12.0\n'
        return 200, b'{"results": [[5], [5]]}'

    server.reply = lambda path: (200, b'{"results": [[2]]}')  # no counter yet
    usage = ServerUsage()
    usage.begin([client])
    server.reply = reply
    assert usage.end([client]) == (12, 3)
