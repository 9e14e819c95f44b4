"""All servers of a run: which of them can be asked, and which weights they have. All ranks know the same.

Rank 0 looks at the servers and brings the weights; the other ranks draw the stream along, as it is gathered over them.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import torch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.rollout.attestation import Place, add_up
from perl_megatron.rollout.digest import digest
from perl_megatron.rollout.engine import SyncReport
from perl_megatron.rollout.ledger import WeightLedger
from perl_megatron.rollout.request_dispatch import Server
from perl_megatron.rollout.server_client import ServerClient, describe
from perl_megatron.rollout.server_survey import Found, Needs, Survey, no_server
from perl_megatron.rollout.weight_push import Pushed, WeightPusher
from perl_megatron.runtime import collective, platform

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Weights = Iterable[tuple[str, torch.Tensor]]


class ServerFleet:
    """The servers of `rollout.servers`.

    Args:
        key: what they demand.
        model_path: of the policy.
        dtype: the engine's.
        max_model_length: bounds prompt plus response in tokens.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        key: str | None,
        model_path: Path | str,
        dtype: torch.dtype,
        max_model_length: int,
    ):
        self._config, self._dtype = config, dtype
        self.servers = [Server(address.rstrip("/")) for address in config.servers]
        self._model_path = Path(model_path)
        self._shapes = published_shapes(read_architecture(model_path))
        self._clients: dict[str, ServerClient] = {}
        self._pusher: WeightPusher | None = None
        self._survey: Survey | None = None
        if collective.rank() == 0:
            self._open(key, max_model_length)
        self._run = collective.gather_objects(uuid.uuid4().hex[:12])[0]
        """Names the weights of this run: another run's version 7 is not ours."""
        self.version = 0
        """Of the weights that the servers were brought last."""
        self._weights: Weights | None = None
        """Those, to bring them again; None before the first time."""
        self.max_sequences = config.max_concurrent_sequences
        """That every server works on at once, at least."""

    @property
    def name(self) -> str:
        """Of the weights that the servers were brought last."""
        return f"{self._run}-{self.version}"

    def update(self, weights: Weights, version: int) -> SyncReport:
        """Bring weights to all servers that are there: see ``ServerEngine.update_weights``."""
        self._weights, self.version = weights, version
        return self.bring("sync", everywhere=True)

    def bring_first(self) -> None:
        """Version 0, the checkpoint's own weights: whatever the servers were started with, or served before."""
        if self._weights is None:
            self.update(CheckpointWeights(self._model_path, tuple(self._shapes)), version=0)

    def bring(self, phase: str, *, everywhere: bool) -> SyncReport:
        """Bring the last weights to all servers that are there, or to those that do not have them; all ranks together.

        Raises:
            UserError: as ``update``, naming ``phase``.
        """
        assert self._weights is not None
        until = time.monotonic() + self._config.sync_deadline
        found, failures = self._look(phase, until)
        name = self.name
        targets = [each for each in found if everywhere or each.weights != name]
        ledger = WeightLedger(self._shapes.keys(), dtype=self._dtype)
        pushed = self._push(ledger, targets, name, until) if targets else Pushed()
        failures |= pushed.failures
        for server in self.servers:
            server.is_ready = server.address not in failures
            server.failure = failures.get(server.address, "")
        if pushed.problems:
            raise UserError(
                f"after weight update {self.version} servers hold other numbers than they were sent, in "
                f"{len(pushed.problems)} places: {'; '.join(pushed.problems[:5])}",
                where="rollout.servers",
                fix="nothing sampled from these weights may be trained on; rollout.engine=embedded does without vLLM",
            )
        warn(failures)
        if len(failures) == len(self.servers):
            raise no_server(phase, failures)
        self.max_sequences = min(each.max_sequences for each in found)
        if not targets:
            return SyncReport(0.0, 0, 0, self.version)
        return replace(ledger.close(self.version), attest_seconds=pushed.attest_seconds)

    def ready_clients(self) -> list[ServerClient]:
        """Of the servers that can be asked; rank 0 alone has any."""
        return [self._clients[server.address] for server in self.servers if server.is_ready and self._clients]

    def digest(self) -> str:
        """Digest of what the servers compute with, read back from all their workers; UserError where two differ."""
        self.bring_first()
        return _decided_by_first(self._read_digest, "the weights could not be read back")

    def close(self) -> None:
        """Let go of the servers, which go on."""
        if self._pusher is not None:
            self._pusher.close()
        for client in self._clients.values():
            client.close()

    def _open(self, key: str | None, max_model_length: int) -> None:
        config = self._config
        for server in self.servers:
            self._clients[server.address] = ServerClient(
                server.address, key=key, seconds=config.health_deadline, sync_seconds=config.sync_deadline
            )
        tensors = [(name, TensorInfo(shape, self._dtype)) for name, shape in self._shapes.items()]
        self._pusher = WeightPusher(config, tensors, model_path=self._model_path)
        dtype = str(self._dtype).removeprefix("torch.")
        needs = Needs(dtype, max_model_length, config.num_rollouts, self._pusher.transport_name())
        shapes = None if config.attestation == "off" else self._shapes
        self._survey = Survey(self.servers, self._clients, needs, shapes)

    def _look(self, phase: str, until: float) -> tuple[list[Found], dict[str, str]]:
        """What rank 0 finds, on all ranks: see ``Survey.look``."""
        survey = self._survey

        def look() -> tuple[list[Found], dict[str, str]]:
            assert survey is not None, "only the first process looks"
            return survey.look(phase=phase, until=until)

        found, failures = _decided_by_first(look, "the servers could not be looked at")
        return found, dict(failures)

    def _push(self, ledger: WeightLedger, targets: Sequence[Found], name: str, until: float) -> Pushed:
        """Draw the stream on all ranks together; rank 0 sends it. What goes wrong anywhere is raised everywhere."""
        assert self._weights is not None
        pushed, error = Pushed(), cast(ValueError | None, None)
        stream = ledger.watch(self._weights)
        try:
            if self._pusher is not None:
                servers = {each.identity: self._clients[each.address] for each in targets}
                version = self.version
                pushed = self._pusher.push(servers, stream, version=version, name=name, deadline=until)
            else:
                for _ in stream:
                    pass
            ledger.check_complete()
        except ValueError as failed:  # a UserError too
            error = failed
        except Exception as failed:
            error = UserError(f"the weights could not be brought: {describe(failed)}", where="rollout.servers")
        reports = collective.gather_objects((pushed, error))
        for _, each in reports:
            if each is not None:
                for server in self.servers:
                    server.fail("an update of its weights broke off")
                raise each
        return reports[0][0]

    def _read_digest(self) -> str:
        """The one digest of all servers that can be asked."""
        digests = {client.address: self._digest_of(client) for client in self.ready_clients()}
        if len(set(digests.values())) != 1:
            fix = "their weights have to be brought again"
            raise UserError(f"servers hold different weights: {digests}", where="rollout.servers", fix=fix)
        return next(iter(digests.values()))

    def _digest_of(self, client: ServerClient) -> str:
        sums = [(Place(*fields), value) for worker in client.call("perl_sums") for fields, value in worker]
        return digest(self._shapes, add_up(sums))


def _decided_by_first(decide: Callable[[], Result], what: str) -> Result:
    """What rank 0 finds, on all ranks; its errors too, as UserErrors that begin with ``what``."""
    answer: Result | UserError | None = None
    if collective.rank() == 0:
        try:
            answer = decide()
        except UserError as error:
            answer = error
        except Exception as error:  # a rank that raised alone would leave the others waiting for it
            answer = UserError(f"{what}: {describe(error)}", where="rollout.servers")
    answer = collective.gather_objects(answer)[0]
    if isinstance(answer, UserError):
        raise answer
    return cast(Result, answer)


def warn(failures: dict[str, str]) -> None:
    """Say, once for all ranks, which servers the run goes on without."""
    if collective.rank() == 0:
        for address, reason in failures.items():
            logger.warning("rollouts go on without the server %s: %s", address, reason)


class CheckpointWeights:
    """The weights of a Hugging Face folder, in the order of a policy's; every iteration reads them again."""

    def __init__(self, path: Path, names: Sequence[str]):
        self._path, self._names = path, names

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        checkpoint = open_checkpoint(self._path)
        for name in self._names:
            yield name, checkpoint[name].to(platform.device())
