"""The server engine: rollouts by vLLM servers in processes of their own, on this machine or on others.

Every rank asks for its share of the views; rank 0 brings the weights. A server that dies, hangs, answers slowly or
wrongly, or lost its weights is done without, and what it owed is asked of another one, with the same seeds; before it
serves again, it is brought the weights.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.rollout.attestation import Place, add_up
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.rollout.digest import digest
from perl_megatron.rollout.dispatch import Server
from perl_megatron.rollout.engine import Sampling, SyncReport
from perl_megatron.rollout.ledger import WeightLedger
from perl_megatron.rollout.server_client import ServerClient, ServerFailure, describe
from perl_megatron.rollout.server_key import read_key
from perl_megatron.rollout.server_rollouts import Question, RolloutRequests
from perl_megatron.rollout.server_survey import Found, Needs, no_server, survey
from perl_megatron.rollout.server_usage import ServerUsage
from perl_megatron.rollout.shares import record_blocks, shares_of
from perl_megatron.rollout.weight_push import Pushed, WeightPusher
from perl_megatron.runtime import collective
from perl_megatron.types import EncodedPrompt, Rollout, View

logger = logging.getLogger(__name__)

MAX_ROUNDS = 4
"""How often what is left over is asked again before the request itself is taken for the cause."""

Weights = Iterable[tuple[str, torch.Tensor]]


class ServerEngine:
    """``RolloutEngine`` on vLLM servers."""

    name = "server"

    def __init__(
        self,
        config: RolloutConfig,
        *,
        encoder: PromptEncoder,
        model_path: Path | str,
        dtype: torch.dtype,
        max_model_length: int,
    ):
        """Nothing is sent yet; all ranks together. ``max_model_length`` bounds prompt plus response in tokens.

        Raises:
            UserError: the key cannot be read.
        """
        self._config, self._encoder, self._dtype = config, encoder, dtype
        self._key = read_key(config.api_key_file)
        self._servers = [Server(address.rstrip("/")) for address in config.servers]
        self._model_path = Path(model_path)
        self._shapes = published_shapes(read_architecture(model_path))
        self._clients: dict[str, ServerClient] = {}
        self._pusher: WeightPusher | None = None
        self._needs = Needs(str(dtype).removeprefix("torch."), max_model_length, config.num_rollouts, None)
        if collective.rank() == 0:
            self._open()
        self._run = collective.gather_objects(uuid.uuid4().hex[:12])[0]
        """Names the weights of this run: another run's version 7 is not ours."""
        self.weight_version = 0
        self._weights: Weights | None = None
        """Those that the servers were brought last, to bring them again; None before the first time."""
        self._max_sequences = config.max_concurrent_sequences
        self._usage = ServerUsage(self._clients)
        self._cache_use = CacheUse()
        self.bring_again: Callable[[], None] = self._bring_again
        """Called by all ranks where servers have to be brought the weights in the middle of ``generate``."""

    def generate(
        self, views: Sequence[View], prompts: Sequence[EncodedPrompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See ``RolloutEngine``; one request for each view, the views of a record to the same server.

        The numbers are those of the same call, but for float rounding: it depends on what else a server works on.

        Raises:
            UserError: no server is left, or a request is refused or fails everywhere; the same on all ranks.
        """
        assert len(views) == len(prompts) == len(seeds)
        self._bring_first()
        mine = shares_of(views, collective.world_size())[collective.rank()]
        questions = [Question(index, views[index], prompts[index], seeds[index]) for index in mine]
        blocks = [[questions[place] for place in block] for block in record_blocks([each.view for each in questions])]
        by_view: dict[int, list[Rollout]] = {}
        for number in itertools.count(1):
            answers, blocks = self._round(blocks, sampling)
            by_view |= answers
            num_left = sum(collective.gather_objects(sum(map(len, blocks))))
            if num_left == 0:
                break
            if number == MAX_ROUNDS:
                raise no_server("generate", {server.address: server.failure for server in self._servers})
            self.bring_again()
        use = CacheUse.of_prompts([prompts[index] for index in mine], sampling.num_rollouts)
        return self._gather(by_view, use, len(views))

    def update_weights(self, weights: Weights, version: int) -> SyncReport:
        """Bring weights to all servers that are there; see ``RolloutEngine``.

        ``weights`` is kept, and drawn again where a server lost them: until the next update it has to give the same.

        Raises:
            UserError: no server took them before `rollout.sync_deadline`, or one holds other numbers than it was sent.
        """
        self._weights, self.weight_version = weights, version
        return self._bring("sync", everywhere=True)

    def take_cache_use(self) -> CacheUse:
        """See ``RolloutEngine``."""
        use, self._cache_use = self._cache_use, CacheUse()
        return use

    def sleep(self) -> None:
        """The servers have devices of their own."""

    def wake(self) -> None:
        """They never slept."""

    def digest(self) -> str:
        """Digest of what the servers compute with, read back from all their workers; UserError where two differ."""
        self._bring_first()
        answer: str | UserError = ""
        if collective.rank() == 0:
            ready = [server.address for server in self._servers if server.is_ready]
            digests = {address: self._digest_of(self._clients[address]) for address in ready}
            answer = next(iter(digests.values()))
            if len(set(digests.values())) > 1:
                fix = "their weights have to be brought again"
                answer = UserError(f"servers hold different weights: {digests}", where="rollout.servers", fix=fix)
        answer = collective.gather_objects(answer)[0]
        if isinstance(answer, UserError):
            raise answer
        return answer

    def close(self) -> None:
        """Let go of the servers, which go on."""
        if self._pusher is not None:
            self._pusher.close()
        for client in self._clients.values():
            client.close()

    def _open(self) -> None:
        config = self._config
        for server in self._servers:
            self._clients[server.address] = ServerClient(
                server.address, key=self._key, seconds=config.health_deadline, sync_seconds=config.sync_deadline
            )
        tensors = [(name, TensorInfo(shape, self._dtype)) for name, shape in self._shapes.items()]
        self._pusher = WeightPusher(config, tensors, model_path=self._model_path)
        self._needs = replace(self._needs, transport=self._pusher.transport_name())

    def _round(
        self, blocks: list[list[Question]], sampling: Sampling
    ) -> tuple[dict[int, list[Rollout]], list[list[Question]]]:
        """The answers by view, and what was left over. UserError on all ranks if it is one on any of them."""
        failed_before = {server.address for server in self._servers if not server.is_ready}
        answers: dict[int, list[Rollout]] = {}
        left_over: list[list[Question]] = []
        error: UserError | None = None
        views_of_block = max(map(len, blocks), default=1)
        at_once = ceil(2 * self._max_sequences / (sampling.num_rollouts * views_of_block * collective.world_size()))
        requests = RolloutRequests(
            self._config, self._encoder, self._key, sampling, weights=(self._weights_name(), self.weight_version)
        )
        try:
            outcome = asyncio.run(
                requests.run(self._servers, blocks, blocks_at_once=max(1, at_once), first=collective.rank())
            )
            answers = {question.index: rollouts for question, rollouts in outcome.answers}
            left_over = [[question] for question in outcome.left_over]
        except UserError as refused:
            error = refused
        failures = {
            server.address: server.failure
            for server in self._servers
            if not server.is_ready and server.address not in failed_before
        }
        reports = collective.gather_objects((error, failures))
        for each, _ in reports:
            if each is not None:
                raise each
        self._warn({address: reason for _, of_rank in reports for address, reason in of_rank.items()})
        return answers, left_over

    def _gather(self, by_view: dict[int, list[Rollout]], use: CacheUse, num_views: int) -> list[Rollout]:
        """All rollouts, in the order of the views."""
        cached = self._usage.take() if collective.rank() == 0 else (0, 0)
        use = replace(use, cached_tokens=cached[0], encoded_images=cached[1])
        whole: dict[int, list[Rollout]] = {}
        for share, use_of_share in collective.gather_objects((by_view, use)):
            assert not whole.keys() & share.keys(), "a view was sampled twice"
            whole |= share
            self._cache_use += use_of_share
        return [rollout for index in range(num_views) for rollout in whole[index]]

    def _weights_name(self) -> str:
        return f"{self._run}-{self.weight_version}"

    def _bring_first(self) -> None:
        """Version 0, the checkpoint's own weights: whatever the servers were started with, or served before."""
        if self._weights is None:
            self.update_weights(_CheckpointWeights(self._model_path, tuple(self._shapes)), version=0)

    def _bring_again(self) -> None:
        """The last weights, to the servers that do not have them; all ranks together."""
        self._bring("generate", everywhere=False)

    def _bring(self, phase: str, *, everywhere: bool) -> SyncReport:
        assert self._weights is not None
        begin = time.monotonic()
        until = begin + self._config.sync_deadline
        found, failures = self._survey(phase, until)
        name = self._weights_name()
        targets = [each for each in found if everywhere or each.weights != name]
        ledger = WeightLedger(self._shapes.keys(), dtype=self._dtype)
        pushed = self._push(ledger, targets, name, until) if targets else Pushed()
        failures |= pushed.failures
        for server in self._servers:
            server.is_ready = server.address not in failures
            server.failure = failures.get(server.address, "")
        if pushed.problems:
            raise UserError(
                f"after weight update {self.weight_version} servers hold other numbers than they were sent, in "
                f"{len(pushed.problems)} places: {'; '.join(pushed.problems[:5])}",
                where="rollout.servers",
                fix="nothing sampled from these weights may be trained on; rollout.engine=embedded does without vLLM",
            )
        self._warn(failures)
        if len(failures) == len(self._servers):
            raise no_server(phase, failures)
        self._max_sequences = min(each.max_sequences for each in found)
        if not targets:
            return SyncReport(0.0, 0, 0, self.weight_version)
        return replace(ledger.close(self.weight_version), attest_seconds=pushed.attest_seconds)

    def _survey(self, phase: str, until: float) -> tuple[list[Found], dict[str, str]]:
        """What rank 0 finds, on all ranks."""
        answer: Any = None
        if self._pusher is not None:
            try:
                found, failures = survey(self._servers, self._clients, self._needs, phase=phase, until=until)
                for each in found:
                    try:
                        self._pusher.check_holdings(each.identity, self._clients[each.address])
                    except ServerFailure as failure:
                        failures[each.address] = str(failure)
                answer = [each for each in found if each.address not in failures], failures
            except UserError as error:
                answer = error
            except Exception as error:
                answer = UserError(f"the servers could not be looked at: {describe(error)}", where="rollout.servers")
        answer = collective.gather_objects(answer)[0]
        if isinstance(answer, UserError):
            raise answer
        return list(answer[0]), dict(answer[1])

    def _push(self, ledger: WeightLedger, targets: Sequence[Found], name: str, until: float) -> Pushed:
        """Draw the stream on all ranks together; rank 0 sends it. What goes wrong anywhere is raised everywhere."""
        assert self._weights is not None
        pushed, error = Pushed(), None
        stream = ledger.watch(self._weights)
        try:
            if self._pusher is not None:
                servers = {each.identity: self._clients[each.address] for each in targets}
                version = self.weight_version
                pushed = self._pusher.push(servers, stream, version=version, name=name, deadline=until)
            else:
                for _ in stream:
                    pass
            ledger.check_complete()
        except (ValueError, OSError) as failed:
            error = failed
        reports = collective.gather_objects((pushed, error))
        for _, each in reports:
            if each is not None:
                for server in self._servers:
                    server.fail("an update of its weights broke off")
                raise each
        return reports[0][0]

    def _digest_of(self, client: ServerClient) -> str:
        sums = [(Place(*fields), value) for worker in client.call("perl_sums") for fields, value in worker]
        return digest(self._shapes, add_up(sums))

    @staticmethod
    def _warn(failures: dict[str, str]) -> None:
        if collective.rank() == 0:
            for address, reason in failures.items():
                logger.warning("rollouts go on without the server %s: %s", address, reason)


class _CheckpointWeights:
    """The weights of a Hugging Face folder, in the order of a policy's; every iteration reads them again."""

    def __init__(self, path: Path, names: Sequence[str]):
        self._path, self._names = path, names

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        checkpoint = open_checkpoint(self._path)
        for name in self._names:
            yield name, checkpoint[name]
