"""Which servers are there, what they are, and which weights they have: asked by the trainer's first process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from perl_megatron.errors import UserError
from perl_megatron.rollout.attestation import Place, uncovered
from perl_megatron.rollout.request_dispatch import Server
from perl_megatron.rollout.server_client import Misfit, ServerClient, ServerFailure, describe

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
    """The name of the weights that it serves; vLLM's 'default' if it was never brought any, '' while it is paused."""
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


class Survey:
    """Looks at servers.

    Args:
        servers: all of them.
        clients: by address.
        needs: what they have to be.
        shapes: of the published tensors, all numbers of which a server has to hold; None: that is not looked at.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        clients: Mapping[str, ServerClient],
        needs: Needs,
        shapes: Mapping[str, Sequence[int]] | None,
    ):
        self._servers, self._clients, self._needs, self._shapes = servers, clients, needs, shapes
        self._known: set[str] = set()
        """Identities of workers whose holdings were looked at."""
        self._has_met = False
        """Whether any server was found fit before."""

    def look(self, *, phase: str, until: float) -> tuple[list[Found], dict[str, str]]:
        """The servers that are there, and why the others are not, by address; waits until one is there.

        ``until`` is a time of ``time.monotonic``.

        Raises:
            UserError: none came until then, naming ``phase`` and every server; or one is not what the run needs, at the
                first look: later the run goes on without it.
        """
        while True:
            with ThreadPoolExecutor(len(self._servers)) as pool:
                results = list(pool.map(self._look, self._servers))
            found = [result for result in results if isinstance(result, Found)]
            failures: dict[str, str] = {}
            for server, result in zip(self._servers, results, strict=True):
                if isinstance(result, Misfit):
                    if not self._has_met:
                        what = f"the server {server.address} is not what this run needs: {result.error.what}"
                        raise UserError(what, where=result.error.where, fix=result.error.fix)
                    failures[server.address] = str(result)
                elif isinstance(result, str):
                    failures[server.address] = result
            if found:
                self._has_met = True
                return found, failures
            if time.monotonic() > until:
                raise no_server(phase, failures)
            time.sleep(POLL_SECONDS)

    def _look(self, server: Server) -> Found | Misfit | str:
        """The server, or why it is not there."""
        client = self._clients[server.address]
        seconds = client.seconds if server.is_ready else min(client.seconds, QUICK_SECONDS)
        try:
            client.ask("health", seconds=seconds)
            description = client.call("perl_describe", seconds=client.seconds)[0]
            self._check(description)
            identity = str(description["identity"])
            self._check_holdings(identity, client)
            weights = str(client.ask("weight_info")["weight_version"])
            # A paused server has the weights' name and answers nothing: it has to be brought them again.
            is_paused = bool(client.ask("is_paused")["is_paused"])
            return Found(server.address, identity, "" if is_paused else weights, int(description["max_num_seqs"]))
        except Misfit as misfit:
            return misfit
        except ServerFailure as failure:
            return str(failure)
        except Exception as error:  # it may say anything, and others may be well
            return f"what it says of itself cannot be read: {describe(error)}"

    def _check(self, description: dict[str, Any]) -> None:
        needs = self._needs
        wanted: dict[str, tuple[Any, bool]] = {
            "dtype": (needs.dtype, description["dtype"] == needs.dtype),
            "logprobs_mode": ("processed_logprobs", description["logprobs_mode"] == "processed_logprobs"),
            "max_model_len": (needs.max_model_length, description["max_model_len"] >= needs.max_model_length),
            "max_num_seqs": (needs.num_rollouts, description["max_num_seqs"] >= needs.num_rollouts),
            "transport": (needs.transport, needs.transport in (None, description["transport"])),
        }
        wrong = [f"{name} is {description[name]}, not {value}" for name, (value, fits) in wanted.items() if not fits]
        if wrong:
            raise Misfit(
                UserError(
                    f"it was started with other settings: {'; '.join(wrong)}",
                    where="rollout.servers",
                    fix="start it with `perl-megatron serve` and the config of this run",
                )
            )

    def _check_holdings(self, identity: str, client: ServerClient) -> None:
        """``Misfit`` unless its workers hold every number of every published tensor, and nothing else."""
        if self._shapes is None or identity in self._known:
            return
        said = client.call("perl_places", seconds=client.seconds)
        problems = [worker["problem"] for worker in said if worker["problem"]]
        places = [Place(*fields) for worker in said for fields in worker["places"]]
        problems += uncovered(self._shapes, places) if not problems else []
        if problems:
            raise Misfit(
                UserError(
                    f"its parameters are not understood: {'; '.join(problems[:5])}",
                    where="rollout.attestation",
                    fix="serve the same model; or rollout.attestation=off, or another version of vLLM there",
                )
            )
        self._known.add(identity)


def no_server(phase: str, failures: Mapping[str, str]) -> UserError:
    """The error that ends a run without servers."""
    reasons = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
    return UserError(
        f"no server is left in the phase '{phase}': {reasons}",
        where="rollout.servers",
        fix="start them (`perl-megatron serve`) and resume; rollout.sync_deadline says how long they are waited for",
    )
