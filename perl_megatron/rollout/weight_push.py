"""Brings weights to all servers in one pass over them: what the trainer's first process does in an update."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from perl_megatron.checkpoint.hf_files import save_checkpoint
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.rollout.delivery import Delivery, FolderTransport, Transport, Update
from perl_megatron.rollout.server_client import ServerClient


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
        self._num_updates: dict[str, int] = {}
        self._last_folder: Path | None = None

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

        ``deadline`` is a time of ``time.monotonic``. The weights are always drawn to their end: other processes, with
        which they are gathered, wait for it.

        Raises:
            ValueError: the stream is not the policy's, or broke off; the servers then hold no usable weights.
            UserError: it cannot be written to `rollout.shared_folder`.
        """
        full = any(self._is_full(identity) for identity in servers)
        update = Update(version, name, full, attests=self._config.attestation != "off")
        folder, is_written = self._folder(name), threading.Event()
        deliveries = {}
        for identity, client in servers.items():
            known = self._transports.pop(identity, None)
            connect = partial(self._connect, client, known, folder, is_written)
            deliveries[identity] = Delivery(client, update, connect)
        for delivery in deliveries.values():
            delivery.start()
        weights = iter(weights)
        stream = self._handed_over(weights, update, list(deliveries.values()), deadline)
        try:
            if folder is not None:
                self._write(folder, stream)
            else:
                for _ in stream:
                    pass
        except BaseException:
            for delivery in deliveries.values():
                delivery.abandon("the stream of weights broke off")
            is_written.set()  # nobody has to wait for it
            for _ in weights:
                pass
            raise
        is_written.set()
        return self._conclude(deliveries, deadline)

    def transport_name(self) -> str | None:
        """What servers have to be started with; None where weights go over a folder."""
        if self._config.weight_transfer == "disk":
            return None
        from perl_megatron.rollout.vllm_transfer import transport_name

        return transport_name()

    def close(self) -> None:
        """Leave all servers, which go on, and the shared folder."""
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()
        if self._last_folder is not None:
            shutil.rmtree(self._last_folder, ignore_errors=True)

    def _connect(
        self, client: ServerClient, known: Transport | None, folder: Path | None, is_written: threading.Event
    ) -> Transport:
        """The connection to a server, made if it is not there yet; called in the thread of its delivery."""
        if folder is not None:
            return FolderTransport(client, folder, is_written)
        if known is not None:
            return known
        from perl_megatron.rollout.vllm_transfer import PassingWeights, Transfer

        return Transfer(
            client,
            PassingWeights(self._tensors),
            num_workers=int(client.ask("get_world_size")["world_size"]),
            seconds=self._config.sync_deadline,
        )

    def _is_full(self, identity: str) -> bool:
        every = self._config.full_attestation_every
        return self._config.attestation == "full" or (every > 0 and self._num_updates.get(identity, 0) % every == 0)

    def _handed_over(
        self, weights: Iterator[tuple[str, Tensor]], update: Update, deliveries: Sequence[Delivery], deadline: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Pass the stream on, and give each tensor to all servers that still take it."""
        expected = iter([name for name, _ in self._tensors])
        for item in weights:
            if item[0] != (due := next(expected, None)):
                raise ValueError(f"weight {item[0]} came where {due or 'the end'} was due: it is not a policy's stream")
            if update.attests:
                update.sent.see(*item)
            for delivery in deliveries:
                if delivery.failure is not None:
                    continue
                # A server that hangs must not use up the time of the others.
                seconds = min(self._config.health_deadline, deadline - time.monotonic())
                if not delivery.weights.put(item, seconds=seconds):
                    delivery.abandon(f"it took nothing for {seconds:.3g} s")
            yield item
        if missing := list(expected):
            raise ValueError(f"{len(missing)} weights did not come: {', '.join(missing[:20])}")
        for delivery in deliveries:
            delivery.weights.complete()

    def _conclude(self, deliveries: dict[str, Delivery], deadline: float) -> Pushed:
        pushed = Pushed()
        for identity, delivery in deliveries.items():
            delivery.conclude(until=deadline)
            if delivery.failure is not None:
                pushed.failures[delivery.client.address] = delivery.failure
                continue
            assert delivery.transport is not None
            self._transports[identity] = delivery.transport
            self._num_updates[identity] = self._num_updates.get(identity, 0) + 1
            pushed.problems += [f"{text} of {delivery.client.address}" for text in delivery.problems]
            pushed.attest_seconds = max(pushed.attest_seconds, delivery.attest_seconds)
        return pushed

    def _folder(self, name: str) -> Path | None:
        if self._config.weight_transfer != "disk":
            return None
        assert self._config.shared_folder is not None, "refused by derive"
        return self._config.shared_folder / f"weights-{name}"

    def _write(self, folder: Path, stream: Iterator[tuple[str, Tensor]]) -> None:
        """Write it beside the last one, which a server may still be reading, and then remove that."""
        shutil.rmtree(folder, ignore_errors=True)  # the same weights, brought again to a server that lost them
        save_checkpoint(folder, stream, self._model_path)
        if self._last_folder not in (None, folder):
            shutil.rmtree(self._last_folder, ignore_errors=True)  # type: ignore[arg-type]
        self._last_folder = folder
