"""What servers did not compute again, from their own counters."""

from __future__ import annotations

from perl_megatron.errors import UserError
from perl_megatron.rollout.server_client import ServerClient, ServerFailure, describe


class ServerUsage:
    """Counts over all servers from the first look at each. Other users of a server are counted too."""

    def __init__(self, clients: dict[str, ServerClient]):
        self._clients = clients
        self._before: dict[str, tuple[int, int]] = {}

    def take(self) -> tuple[int, int]:
        """(prompt tokens found in prefix caches, images that vision towers encoded) since the last call.

        A server that cannot be asked counts nothing; after a restart its counters begin again.
        """
        tokens = images = 0
        for address, client in self._clients.items():
            try:
                now = self._read(client)
            except (ServerFailure, UserError):  # whoever asks next for something that is needed will say so
                continue
            before = self._before.get(address, (0, 0))
            if any(new < old for new, old in zip(now, before, strict=True)):
                before = (0, 0)
            tokens, images = tokens + now[0] - before[0], images + now[1] - before[1]
            self._before[address] = now
        return tokens, images

    @staticmethod
    def _read(client: ServerClient) -> tuple[int, int]:
        workers = client.call("perl_encoded_images", seconds=client.seconds)
        tokens = client.metric("vllm:prefix_cache_hits_total")
        try:
            return int(tokens), int(workers[0][0])  # every worker of a server encodes the same images
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ServerFailure(f"its counters cannot be read: {describe(error)}") from error
