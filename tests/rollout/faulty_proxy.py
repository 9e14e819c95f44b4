"""Stands between the trainer and a real server, and spoils what passes: late answers, and garbage."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from perl_megatron.rollout.server_client import connection

Spoil = Callable[[bytes], tuple[int, bytes]]
"""Answer → status and answer."""


class FaultyProxy:
    """Passes everything on to ``target``, and the answers of ``/inference/v1/generate`` through ``spoil``."""

    def __init__(self, target: str):
        self.spoil: Spoil | None = None
        self.num_spoiled = 0
        self.is_asked = threading.Event()
        """Set from the first request for rollouts on."""
        proxy, http = self, httpx.Client(base_url=target, timeout=120, **connection(target, None))

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass_on()

            def do_POST(self) -> None:
                self._pass_on()

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path.endswith("/generate"):
                    proxy.is_asked.set()
                kept = {
                    name: value for name, value in self.headers.items() if name in ("Content-Type", "Authorization")
                }
                try:
                    reply = http.request(self.command, self.path, content=body, headers=kept)
                    status, content = reply.status_code, reply.content
                except httpx.HTTPError as error:
                    status, content = 502, str(error).encode()
                if proxy.spoil is not None and self.path.endswith("/generate"):
                    proxy.num_spoiled += 1
                    status, content = proxy.spoil(content)
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # the trainer waits no more

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def late(until: threading.Event, answers: Spoil = lambda answer: (200, answer)) -> Spoil:
    """What ``answers`` makes of the answer, but not before ``until`` is set."""

    def spoil(answer: bytes) -> tuple[int, bytes]:
        until.wait()
        return answers(answer)

    return spoil


def changed(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """The answer, well-formed, but for what ``change`` does to it."""

    def spoil(answer: bytes) -> tuple[int, bytes]:
        content = json.loads(answer)
        change(content)
        return 200, json.dumps(content).encode()

    return spoil
