"""Brings weights to all servers in one pass over them: what the trainer's first process does in an update."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from perl_megatron.checkpoint.hf_files import save_checkpoint
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.errors import UserError
from perl_megatron.rollout.attestation import Place, uncovered
from perl_megatron.rollout.delivery import Delivery, FolderTransport, Transport, Update
from perl_megatron.rollout.server_client import ServerClient, ServerFailure


@dataclass
class Pushed:
    """What became of an update."""

    failures: dict[str, str] = field(default_factory=dict)
    """By address, of the servers that did not take it."""
    problems: list[str] = field(default_factory=list)
    """What servers hold otherwise than they were sent, in words."""
    attest_seconds: float = 0.0
    """The longest of all servers."""


class WeightPusher:
    """Remembers the connections to the servers from update to update.

    Args:
        tensors: published name, shape, and the engine's dtype, in the order in which they come.
        model_path: the folder whose configuration and tokenizer go with weights on disk.
    """

    def __init__(self, config: RolloutConfig, tensors: Sequence[tuple[str, TensorInfo]], *, model_path: Path | str):
        self._config, self._tensors, self._model_path = config, list(tensors), Path(model_path)
        self._transports: dict[str, Transport] = {}
        """By the identity of the server's workers, which a restart changes."""
        self._known: set[str] = set()
        """Identities whose holdings were checked."""
        self._num_updates: dict[str, int] = {}

    def push(
        self,
        servers: dict[str, ServerClient],
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        name: str,
        deadline: float,
    ) -> Pushed:
        """One pass over ``weights`` (in the engine's dtype) into ``servers``, by their identities.

        ``deadline`` is a time of ``time.monotonic``. The stream is always drawn to its end.

        Raises:
            ValueError: the stream is not the policy's, or broke off; the servers then hold no usable weights.
        """
        full = any(self._is_full(identity) for identity in servers)
        update = Update(version, name, full, attests=self._config.attestation != "off")
        folder, is_written = self._folder(name), threading.Event()
        deliveries = []
        for identity, client in servers.items():
            # Only what has come through comes back: one that was given up is closed, perhaps after this has returned.
            connect = _Connector(self, self._transports.pop(identity, None), client, folder, is_written)
            deliveries.append(Delivery(client, update, connect))
        for delivery in deliveries:
            delivery.start()
        source = iter(weights)
        stream = self._handed_over(source, update, deliveries, deadline)
        try:
            if folder is not None:
                self._write(folder, stream)
            else:
                for _ in stream:
                    pass
        except BaseException:
            for delivery in deliveries:
                delivery.abandon("the stream of weights broke off")
            for _ in source:  # other processes wait for this one until its end
                pass
            raise
        is_written.set()
        for delivery in deliveries:
            delivery.weights.complete()
        pushed = self._wait(deliveries, deadline)
        if folder is not None:
            self._remove_others(folder)
        for identity, delivery in zip(servers, deliveries, strict=True):
            if delivery.failure is None:
                self._num_updates[identity] = self._num_updates.get(identity, 0) + 1
                if delivery.transport is not None:
                    self._transports[identity] = delivery.transport
        return pushed

    def check_holdings(self, identity: str, client: ServerClient) -> None:
        """UserError unless the server's workers hold every number of every published tensor, and nothing else."""
        if identity in self._known or self._config.attestation == "off":
            return
        places = [Place(*fields) for worker in client.call("perl_places") for fields in worker]
        problems = uncovered({name: info.shape for name, info in self._tensors}, places)
        if problems:
            raise UserError(
                f"the parameters of the server {client.address} are not understood: {'; '.join(problems[:5])}",
                where="rollout.attestation",
                fix="serve the same model; or rollout.attestation=off, or another version of vLLM there",
            )
        self._known.add(identity)

    def close(self) -> None:
        """Leave all servers, which go on."""
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    def transport(
        self, held: Transport | None, client: ServerClient, folder: Path | None, is_written: threading.Event
    ) -> Transport:
        """The connection to a server, made if none is held from the last update."""
        if folder is not None:
            return FolderTransport(client, folder, is_written)
        if held is not None:
            return held
        from perl_megatron.rollout.vllm_transfer import PassingWeights, Transfer

        return Transfer(
            client,
            PassingWeights(self._tensors),
            num_workers=int(client.ask("get_world_size")["world_size"]),
            seconds=self._config.sync_deadline,
        )

    def transport_name(self) -> str | None:
        """What servers have to be started with; None where weights go over a folder."""
        if self._config.weight_transfer == "disk":
            return None
        from perl_megatron.rollout.vllm_transfer import transport_name

        return transport_name()

    def _is_full(self, identity: str) -> bool:
        every = self._config.full_attestation_every
        return self._config.attestation == "full" or (every > 0 and self._num_updates.get(identity, 0) % every == 0)

    def _handed_over(
        self, weights: Iterable[tuple[str, Tensor]], update: Update, deliveries: Sequence[Delivery], deadline: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Pass the stream on, and give each tensor to all servers that still take it."""
        expected = iter([name for name, _ in self._tensors])
        for item in weights:
            if item[0] != (due := next(expected, None)):
                raise ValueError(f"weight {item[0]} came where {due or 'the end'} was due: it is not a policy's stream")
            if update.attests:
                update.sent.see(*item)
            for delivery in deliveries:
                if not delivery.is_taking:
                    continue
                # A server that hangs must not use up the time of the others.
                seconds = min(self._config.health_deadline, deadline - time.monotonic())
                if not delivery.weights.put(item, seconds=seconds):
                    delivery.abandon(f"it took nothing for {self._config.health_deadline:g} s")
            yield item
        if missing := list(expected):
            raise ValueError(f"{len(missing)} weights did not come: {', '.join(missing[:20])}")

    @staticmethod
    def _wait(deliveries: Sequence[Delivery], deadline: float) -> Pushed:
        pushed = Pushed()
        for delivery in deliveries:
            if delivery.failure is None:  # what was given up may hang for long
                delivery.join(max(0.0, deadline - time.monotonic()))
            if delivery.is_alive():
                delivery.abandon("it did not get done in time (rollout.sync_deadline)")
            address = delivery.client.address
            if delivery.failure is not None:
                pushed.failures[address] = delivery.failure
            pushed.problems += [f"{text} of {address}" for text in delivery.problems]
            pushed.attest_seconds = max(pushed.attest_seconds, delivery.attest_seconds)
        return pushed

    def _folder(self, name: str) -> Path | None:
        if self._config.weight_transfer != "disk":
            return None
        assert self._config.shared_folder is not None, "refused by derive"
        return self._config.shared_folder / f"weights-{name}"

    def _write(self, folder: Path, stream: Iterator[tuple[str, Tensor]]) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # the same weights, brought again to a server that lost them
        save_checkpoint(folder, stream, self._model_path)

    @staticmethod
    def _remove_others(folder: Path) -> None:
        """Older weights of this run; those of other runs in the same folder stay."""
        run = folder.name.rsplit("-", 1)[0]
        for other in folder.parent.glob(f"{run}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


@dataclass(frozen=True)
class _Connector:
    """``WeightPusher.transport`` for one server, to be called in its thread."""

    pusher: WeightPusher
    held: Transport | None
    client: ServerClient
    folder: Path | None
    is_written: threading.Event

    def __call__(self) -> Transport:
        try:
            return self.pusher.transport(self.held, self.client, self.folder, self.is_written)
        except (OSError, RuntimeError) as error:
            raise ServerFailure(f"no connection for weights: {error}") from error
