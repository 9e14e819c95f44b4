"""What servers did not compute again, from their own counters."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from perl_megatron.rollout.server_client import ServerClient

SECONDS = 5.0
"""What a server may take to say its counters: nobody is held up for a statistic."""


class ServerUsage:
    """Counts between ``begin`` and ``end``, over the servers that can be asked. Other users of a server count too."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, int]] = {}

    def begin(self, clients: Sequence[ServerClient]) -> None:
        """Look at the counters of the servers that are about to work."""
        self._before = _read_all(clients)

    def end(self, clients: Sequence[ServerClient]) -> tuple[int, int]:
        """(prompt tokens found in prefix caches, images that vision towers encoded) since ``begin``.

        A server that was restarted meanwhile, or does not answer, counts nothing.
        """
        tokens = images = 0
        for address, now in _read_all(clients).items():
            before = self._before.get(address)
            if before is not None and all(new >= old for new, old in zip(now, before, strict=True)):
                tokens, images = tokens + now[0] - before[0], images + now[1] - before[1]
        return tokens, images


def _read_all(clients: Sequence[ServerClient]) -> dict[str, tuple[int, int]]:
    """By address."""
    if not clients:
        return {}
    with ThreadPoolExecutor(len(clients)) as pool:
        found = list(pool.map(_read, clients))
    return {client.address: counts for client, counts in zip(clients, found, strict=True) if counts is not None}


def _read(client: ServerClient) -> tuple[int, int] | None:
    try:
        # Every worker of a server encodes the same images.
        images = client.call("perl_encoded_images", seconds=SECONDS)[0][0]
        return int(client.metric("vllm:prefix_cache_hits_total", seconds=SECONDS)), int(images)
    except Exception:  # whatever a server says: a run does not end over a statistic
        return None
