"""One vLLM server, over HTTP: what the trainer asks of it beside rollouts.

Errors of all kinds come as ``ServerFailure`` with the server's address and what it was asked for.
"""

from __future__ import annotations

import json
import ssl
import time
from typing import Any

import httpx

from perl_megatron.errors import UserError


class ServerFailure(Exception):
    """A server did not do what it was asked; the text says what, not which server."""


class Misfit(ServerFailure):
    """A server is there, but is not what the run needs: another key, other routes, other settings."""

    def __init__(self, error: UserError):
        super().__init__(error.what)
        self.error = error


class ServerClient:
    """Blocking calls, from any thread. Also vLLM's ``VLLMWeightSyncClient`` (four of the methods).

    Args:
        address: `http://host:port`.
        key: what the server demands; None: nothing.
        seconds: what a call may take; one that moves weights has ``sync_seconds``.
    """

    def __init__(self, address: str, *, key: str | None, seconds: float, sync_seconds: float):
        self.address = address.rstrip("/")
        self.seconds, self.sync_seconds = seconds, sync_seconds
        self._http = httpx.Client(base_url=self.address, **connection(self.address, key))

    def ask(self, path: str, *, seconds: float | None = None) -> Any:
        """What the server says at a route, as JSON; None for no content."""
        return self._send("GET", path, seconds=seconds)

    def tell(self, path: str, body: Any = None, *, seconds: float | None = None, **query: str) -> Any:
        """Make the server do something; its answer as JSON, None for no content."""
        return self._send("POST", path, body=body, seconds=seconds, query=query)

    def call(self, method: str, *arguments: Any, seconds: float | None = None) -> list[Any]:
        """A method of ``WorkerExtension`` on all workers; their results, in rank order."""
        body = {"method": method, "args": list(arguments)}
        answer = self.tell("collective_rpc", body, seconds=self.sync_seconds if seconds is None else seconds)
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or not results:
            raise ServerFailure(f"{method}: its workers answered {str(answer)[:200]}")
        return results

    def metric(self, name: str, *, seconds: float | None = None) -> float:
        """The sum of one of vLLM's counters over its engines."""
        lines = str(self._send("GET", "metrics", seconds=seconds, as_text=True)).splitlines()
        values = [line.rsplit(" ", 1)[-1] for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        try:
            return sum(map(float, values))
        except ValueError as error:
            raise ServerFailure(f"/metrics: {name} is {values}") from error

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers join the trainer."""
        self.tell("init_weight_transfer_engine", {"init_info": init_info}, seconds=self.sync_seconds)

    def start_weight_update(self) -> None:
        """Weights are about to come."""
        self.tell("start_weight_update", seconds=self.sync_seconds)

    def update_weights(self, update_info: Any) -> None:
        """Let the workers receive what is announced; returns when they have."""
        self.tell("update_weights", {"update_info": update_info}, seconds=self.sync_seconds)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All weights have come. The version is set later, when they have been attested."""
        del weight_version
        self.tell("finish_weight_update", {}, seconds=self.sync_seconds)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        seconds: float | None = None,
        query: dict[str, str] | None = None,
        as_text: bool = False,
    ) -> Any:
        limit = self.seconds if seconds is None else seconds
        until = time.monotonic() + limit
        try:
            with self._http.stream(method, f"/{path}", json=body, params=query, timeout=limit) as reply:
                content = b""
                for part in reply.iter_bytes():  # `timeout` is that of each part
                    content += part
                    if time.monotonic() > until:
                        raise httpx.ReadTimeout("the answer comes too slowly")
            refuse(reply.status_code, content, path)
            if as_text:
                return content.decode(errors="replace")
            return json.loads(content) if content else None
        except httpx.TimeoutException as error:
            raise ServerFailure(f"/{path} was not answered within {limit:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
            raise ServerFailure(f"/{path}: {describe(error)}") from error


def connection(address: str, key: str | None) -> dict[str, Any]:
    """httpx's options for a server.

    Not through a proxy of the environment, as rollouts and weights stay in the cluster; but the environment's
    certificates (SSL_CERT_FILE) count. Each request has a connection of its own: servers close those that nobody used
    for some seconds (vLLM: after 5), and one that does so while the next request is on its way would look dead.
    """
    options: dict[str, Any] = {
        "headers": {} if key is None else {"Authorization": f"Bearer {key}"},
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=0),
        "trust_env": False,
    }
    return options | ({"verify": ssl.create_default_context()} if address.startswith("https:") else {})


def refuse(status: int, content: bytes, path: str) -> None:
    """ServerFailure for a reply that is no success; ``Misfit`` where the server is of another kind."""
    text = content[:300].decode(errors="replace")
    if status == 401:
        raise Misfit(
            UserError(
                "it does not take the key",
                where="rollout.api_key_file",
                fix="use the file that the server was started with",
            )
        )
    if status in (403, 404):
        raise Misfit(
            UserError(
                f"it has no route /{path}: {text}",
                where="rollout.servers",
                fix="start it with `perl-megatron serve`, or with the flags of docs/rollout.md",
            )
        )
    if not 200 <= status < 300:
        raise ServerFailure(f"/{path} was answered with status {status}: {text}")


def describe(error: Exception) -> str:
    """An error in words, also one that has none."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
