"""A rollout server for a benchmark: `perl-megatron serve` in a process of its own."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx


@contextmanager
def running_server(command: Sequence[str], address: str, log: Path, environment: dict[str, str]) -> Iterator[None]:
    """The server that ``command`` starts, from when it answers at ``address`` to the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        while process.poll() is None and not _answers(address):
            time.sleep(0.5)
        if process.poll() is not None:
            raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
        yield
    finally:
        process.terminate()
        process.wait(60)


def _answers(address: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{address}/health", timeout=5, trust_env=False).is_success
    return False
