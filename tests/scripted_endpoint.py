"""A chat endpoint on loopback that says what a script says, and fails where the script says so."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Said:
    """One HTTP answer: a completion of some texts, or any body."""

    texts: tuple[str | None, ...] = ()
    status: int = 200
    body: bytes | None = None
    finish_reason: str = "stop"
    refusal: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0.0
    """Seconds before anything is sent."""
    pause: float = 0.0
    """Seconds after each byte of the body."""

    def encoded(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "refusal": self.refusal}
        choices = [
            {"index": index, "message": message | {"content": text}, "finish_reason": self.finish_reason}
            for index, text in enumerate(self.texts)
        ]
        usage = {"prompt_tokens": 10, "completion_tokens": len(choices), "total_tokens": 10 + len(choices)}
        return json.dumps({"id": "x", "object": "chat.completion", "choices": choices, "usage": usage}).encode()


def failed(status: int, message: str = "scripted", **error: str) -> Said:
    """An error in the form of OpenAI's."""
    return Said(status=status, body=json.dumps({"error": {"message": message, **error}}).encode())


class ScriptedEndpoint:
    """Speaks `/v1/models` and `/v1/chat/completions`. A context manager.

    Args:
        script: body of a request → what is said.
        models: what is listed.
    """

    def __init__(self, script: Callable[[dict[str, Any]], Said], models: tuple[str, ...] = ("scripted",)):
        self.script, self.models = script, models
        self.bodies: list[dict[str, Any]] = []
        """Of all requests for completions, as they came."""
        self.keys: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once, self._lock = 0, threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                listed = [{"id": name, "object": "model"} for name in endpoint.models]
                self._send(Said(body=json.dumps({"object": "list", "data": listed}).encode()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.bodies.append(body)
                    endpoint.keys.append(self.headers["Authorization"])
                    endpoint.headers.append(dict(self.headers))
                    endpoint._at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._at_once)
                try:
                    said = endpoint.script(body) if self.path == "/v1/chat/completions" else failed(404, "no such path")
                    time.sleep(said.wait)
                finally:
                    with endpoint._lock:
                        endpoint._at_once -= 1
                self._send(said)

            def _send(self, said: Said) -> None:
                content = said.encoded()
                try:
                    self.send_response(said.status)
                    for name, value in {"Content-Type": "application/json", **said.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    for piece in (content[k : k + 1] for k in range(len(content))) if said.pause else [content]:
                        self.wfile.write(piece)
                        time.sleep(said.pause)
                except OSError:
                    self.close_connection = True  # the client waits no more

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> ScriptedEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def asked_text(body: dict[str, Any]) -> str:
    """All texts of a request, in order; an image is `[image]`."""
    found = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found += [part["text"] if part["type"] == "text" else "[image]" for part in parts]
    return "".join(found)
