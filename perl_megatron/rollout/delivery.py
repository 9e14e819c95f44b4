"""Brings the weights of one update to one server, in a thread of its own, and attests that it holds them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from perl_megatron.rollout.fingerprints import Fingerprints
from perl_megatron.rollout.hand_over import HandOver
from perl_megatron.rollout.server_client import ServerClient, ServerFailure, describe


class Transport(Protocol):
    """How the tensors of an update get into a server."""

    def send(self, weights: HandOver[tuple[str, Tensor]]) -> None:
        """Send all that is handed over; returns when the server has loaded it."""
        ...

    def close(self) -> None:
        """Let go of the server."""
        ...


class FolderTransport:
    """The weights lie in a folder that the server sees, as soon as the last one was handed over."""

    def __init__(self, client: ServerClient, folder: Path, is_written: threading.Event):
        self._client, self._folder, self._is_written = client, folder, is_written

    def send(self, weights: HandOver[tuple[str, Tensor]]) -> None:
        """Let the server load the folder."""
        for _ in weights:
            pass
        if not self._is_written.wait(self._client.sync_seconds):
            raise ServerFailure("the weights were not written in time")
        self._client.call("perl_load_folder", str(self._folder))

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Update:
    """One update, for all servers."""

    version: int
    name: str
    """Of the weights, as servers are told it: unique over runs, where versions are not."""
    full: bool
    """Whether all numbers are compared, or samples."""
    attests: bool
    sent: Fingerprints = field(init=False)

    def __post_init__(self) -> None:
        self.sent = Fingerprints(version=self.version, full=self.full)


class Delivery(threading.Thread):
    """An update on its way to a server. Start it, put the weights into ``weights``, then join it.

    Args:
        connect: gives the transport; ServerFailure or another error where the server cannot be connected.
    """

    def __init__(self, client: ServerClient, update: Update, connect: Callable[[], Transport]):
        super().__init__(name=f"weights to {client.address}", daemon=True)
        self.client, self.weights = client, HandOver[tuple[str, Tensor]]()
        self.phase = "start"
        self.failure: str | None = None
        """Why the server did not take the update."""
        self.problems: list[str] = []
        """What the server holds otherwise than it was sent; it does not serve then."""
        self.attest_seconds = 0.0
        self._update, self._connect = update, connect
        self.transport: Transport | None = None
        """As soon as the server is connected."""
        self._is_abandoned = False

    def run(self) -> None:
        """All steps; what goes wrong ends in ``failure``."""
        try:
            self._deliver()
        except Exception as error:
            if self.failure is None:  # else it was given up, and this is what came of it
                reason = str(error) if isinstance(error, ServerFailure) else describe(error)
                self.failure = f"{self.phase}: {reason}"
        finally:
            self.weights.give_up()
            if self.failure is not None and self.transport is not None:
                self.transport.close()  # the workers wait for what will not come

    @property
    def is_taking(self) -> bool:
        """Whether weights are still to be put."""
        return self.failure is None and not self.weights.is_given_up

    def abandon(self, reason: str) -> None:
        """Give the server up from outside, unless it failed by itself; the thread ends at its next step."""
        self._is_abandoned = True
        if self.failure is None:
            self.failure = f"{self.phase}: {reason}"
        self.weights.give_up()
        if self.transport is not None:
            self.transport.close()

    def _deliver(self) -> None:
        client, update = self.client, self._update
        self._enter("pause")
        client.tell("pause", seconds=client.sync_seconds, mode="abort", clear_cache="true")
        self._enter("connect")
        self.transport = self._connect()
        self._enter("begin the update")
        client.call("perl_expect", update.version, update.full, update.attests)
        self._enter("send the weights")
        self.transport.send(self.weights)
        self._enter("attest")
        begin = time.perf_counter()
        for worker, said in enumerate(client.call("perl_conclude")):
            texts = list(said["problems"])
            if update.attests:
                texts += update.sent.differences(said["received"])
            self.problems += [f"{text} (worker {worker})" for text in texts]
        self.attest_seconds = time.perf_counter() - begin
        if self.problems:
            return
        self._enter("drop the caches")
        for cache in ("prefix", "mm", "encoder"):
            client.tell(f"reset_{cache}_cache")
        self._enter("resume")
        client.tell("update_weight_version", {"new_version": update.name})
        client.tell("resume")

    def _enter(self, phase: str) -> None:
        if self._is_abandoned:
            raise ServerFailure("it was given up")
        self.phase = phase
