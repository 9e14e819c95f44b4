"""Which servers are there, what they are, and which weights they have: asked by the trainer's first process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from perl_megatron.errors import UserError
from perl_megatron.rollout.dispatch import Server
from perl_megatron.rollout.server_client import ServerClient, ServerFailure

POLL_SECONDS = 1.0
"""Between two looks at servers of which none is there."""
QUICK_SECONDS = 5.0
"""What a server that failed before may take to show that it is back: the others wait for it."""


@dataclass(frozen=True)
class Found:
    """A server that is there."""

    address: str
    identity: str
    """Of its workers; a restart changes it."""
    weights: str
    """The name of the weights that it has; vLLM's 'default' where it was never brought any."""
    max_sequences: int
    """That it works on at once."""


@dataclass(frozen=True)
class Needs:
    """What a server has to be started with."""

    dtype: str
    max_model_length: int
    num_rollouts: int
    transport: str | None
    """Of weights; None: they come over a folder."""


def survey(
    servers: Sequence[Server], clients: dict[str, ServerClient], needs: Needs, *, phase: str, until: float
) -> tuple[list[Found], dict[str, str]]:
    """The servers that are there, and why the others are not, by address; waits until one is there.

    ``until`` is a time of ``time.monotonic``.

    Raises:
        UserError: none came until then, naming ``phase`` and every server; or one was started with other settings.
    """
    while True:
        with ThreadPoolExecutor(len(servers)) as pool:
            results = list(pool.map(lambda server: _look(server, clients[server.address], needs), servers))
        found = [result for result in results if isinstance(result, Found)]
        failures = {
            server.address: result for server, result in zip(servers, results, strict=True) if isinstance(result, str)
        }
        if found:
            return found, failures
        if time.monotonic() > until:
            raise no_server(phase, failures)
        time.sleep(POLL_SECONDS)


def no_server(phase: str, failures: dict[str, str]) -> UserError:
    """The error that ends a run without servers."""
    reasons = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
    return UserError(
        f"no server is left in the phase '{phase}': {reasons}",
        where="rollout.servers",
        fix="start them (`perl-megatron serve`) and resume; rollout.sync_deadline says how long they are waited for",
    )


def _look(server: Server, client: ServerClient, needs: Needs) -> Found | str:
    """The server, or why it is not there."""
    seconds = client.seconds if server.is_ready else min(client.seconds, QUICK_SECONDS)
    try:
        client.ask("health", seconds=seconds)
        description = client.call("perl_describe", seconds=client.seconds)[0]
        _check(client.address, description, needs)
        weights = client.ask("weight_info")["weight_version"]
        return Found(client.address, str(description["identity"]), str(weights), int(description["max_num_seqs"]))
    except ServerFailure as failure:
        return str(failure)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        return f"it says of itself what cannot be read: {error!r}"


def _check(address: str, description: dict[str, Any], needs: Needs) -> None:
    wanted: dict[str, tuple[Any, bool]] = {
        "dtype": (needs.dtype, description["dtype"] == needs.dtype),
        "logprobs_mode": ("processed_logprobs", description["logprobs_mode"] == "processed_logprobs"),
        "max_model_len": (needs.max_model_length, description["max_model_len"] >= needs.max_model_length),
        "max_num_seqs": (needs.num_rollouts, description["max_num_seqs"] >= needs.num_rollouts),
        "transport": (needs.transport, needs.transport in (None, description["transport"])),
    }
    wrong = [f"{name} is {description[name]}, not {value}" for name, (value, fits) in wanted.items() if not fits]
    if wrong:
        raise UserError(
            f"the server {address} was started with other settings: {'; '.join(wrong)}",
            where="rollout.servers",
            fix="start it with `perl-megatron serve` and the config of this run",
        )
