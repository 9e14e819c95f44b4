"""The server engine: rollouts by vLLM servers in processes of their own, on this machine or on others.

Every rank asks for its share of the views; rank 0 brings the weights. A server that dies, hangs, answers slowly or
wrongly, or lost its weights is done without, and what it owed is asked of another one, with the same seeds; before it
serves again, it is brought the weights.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import torch

from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.rollout.engine import Sampling, SyncReport
from perl_megatron.rollout.server_client import describe
from perl_megatron.rollout.server_fleet import ServerFleet, Weights, warn
from perl_megatron.rollout.server_rollouts import CancellableRun, Question, RolloutRequests
from perl_megatron.rollout.server_usage import ServerUsage
from perl_megatron.rollout.shares import record_blocks, shares_of
from perl_megatron.runtime import collective
from perl_megatron.runtime.key_file import read_key
from perl_megatron.types import EncodedPrompt, Rollout, View

logger = logging.getLogger(__name__)

MAX_ROUNDS = 4
"""How often what is left over is asked again before the run ends: the requests themselves may be the cause."""


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
        self._config, self._encoder = config, encoder
        self._key = read_key(config.api_key_file, "rollout.api_key_file")
        self._fleet = ServerFleet(
            config, key=self._key, model_path=model_path, dtype=dtype, max_model_length=max_model_length
        )
        self._usage, self._requests = ServerUsage(), CancellableRun()
        self._cache_use = CacheUse()
        self.bring_again: Callable[[], None] = self.bring_last_weights
        """Called by all ranks where servers have to be brought the weights in the middle of ``generate``."""

    @property
    def weight_version(self) -> int:
        """See ``RolloutEngine``."""
        return self._fleet.version

    def generate(
        self, views: Sequence[View], prompts: Sequence[EncodedPrompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See ``RolloutEngine``; one request for each view, the views of a record to the same server.

        The numbers are those of the same call, but for float rounding: it depends on what else a server works on.

        Raises:
            UserError: no server is left, or a request is refused or fails everywhere; the same on all ranks.
        """
        assert len(views) == len(prompts) == len(seeds)
        self._fleet.bring_first()
        mine = shares_of(views, collective.world_size())[collective.rank()]
        questions = [Question(index, views[index], prompts[index], seeds[index]) for index in mine]
        blocks = [[questions[place] for place in block] for block in record_blocks([each.view for each in questions])]
        self._usage.begin(self._fleet.ready_clients())
        by_view: dict[int, list[Rollout]] = {}
        for number in itertools.count(1):
            answers, blocks = self._round(blocks, sampling)
            by_view |= answers
            left = [name for names in collective.gather_objects(_records_of(blocks)) for name in names]
            if not left:
                break
            if number == MAX_ROUNDS:
                raise self._unanswered(left)
            self.bring_again()
        use = CacheUse.of_prompts([prompts[index] for index in mine], sampling.num_rollouts)
        return self._gather(by_view, use, len(views))

    def update_weights(self, weights: Weights, version: int) -> SyncReport:
        """Bring weights to all servers that are there; see ``RolloutEngine``.

        ``weights`` is kept, and drawn again where a server lost them: until the next update it has to give the same.

        Raises:
            UserError: no server took them before `rollout.sync_deadline`, or one holds other numbers than it was sent.
        """
        return self._fleet.update(weights, version)

    def bring_last_weights(self) -> None:
        """The last weights, to the servers that do not have them; all ranks together."""
        self._fleet.bring("generate", everywhere=False)

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
        return self._fleet.digest()

    def give_up(self) -> None:
        """End a ``generate`` that is under way in another thread; it raises UserError on all ranks."""
        self._requests.cancel()

    def close(self) -> None:
        """Let go of the servers, which go on."""
        self._fleet.close()

    def _round(
        self, blocks: list[list[Question]], sampling: Sampling
    ) -> tuple[dict[int, list[Rollout]], list[list[Question]]]:
        """The answers by view, and what was left over. UserError on all ranks if it is one on any of them."""
        failed_before = {server.address for server in self._fleet.servers if not server.is_ready}
        answers: dict[int, list[Rollout]] = {}
        left_over: list[list[Question]] = []
        error: UserError | None = None
        views_of_block = max(map(len, blocks), default=1)
        at_once = ceil(
            2 * self._fleet.max_sequences / (sampling.num_rollouts * views_of_block * collective.world_size())
        )
        requests = RolloutRequests(
            self._config, self._encoder, self._key, sampling, weights=(self._fleet.name, self._fleet.version)
        )
        try:
            outcome = self._requests.run(
                requests.run(self._fleet.servers, blocks, blocks_at_once=max(1, at_once), first=collective.rank())
            )
            answers = {question.index: rollouts for question, rollouts in outcome.answers}
            left_over = [[question] for question in outcome.left_over]
        except UserError as refused:
            error = refused
        except Exception as failed:  # a rank that raised alone would leave the others waiting for it
            logger.exception("rollouts could not be asked for")  # the other ranks get its words only
            error = UserError(f"rollouts could not be asked for: {describe(failed)}", where="rollout.engine")
        failures = {
            server.address: server.failure
            for server in self._fleet.servers
            if not server.is_ready and server.address not in failed_before
        }
        reports = collective.gather_objects((error, failures))
        for each, _ in reports:
            if each is not None:
                raise each
        warn({address: reason for _, of_rank in reports for address, reason in of_rank.items()})
        return answers, left_over

    def _gather(self, by_view: dict[int, list[Rollout]], use: CacheUse, num_views: int) -> list[Rollout]:
        """All rollouts, in the order of the views."""
        cached = self._usage.end(self._fleet.ready_clients())
        use = replace(use, cached_tokens=cached[0], encoded_images=cached[1])
        whole: dict[int, list[Rollout]] = {}
        for share, use_of_share in collective.gather_objects((by_view, use)):
            assert not whole.keys() & share.keys(), "a view was sampled twice"
            whole |= share
            self._cache_use += use_of_share
        return [rollout for index in range(num_views) for rollout in whole[index]]

    def _unanswered(self, records: Sequence[str]) -> UserError:
        """The error of requests that were asked again and again."""
        reasons = "; ".join(f"{server.address}: {server.failure or 'it is well'}" for server in self._fleet.servers)
        return UserError(
            f"no server answers the requests of {len(set(records))} records, such as {records[0]}, which were asked "
            f"{MAX_ROUNDS} times: {reasons}",
            where="rollout.servers",
            fix="look at the servers' logs; a record that every server fails on may be the cause",
        )


def _records_of(blocks: Sequence[Sequence[Question]]) -> list[str]:
    return [question.view.record_id for block in blocks for question in block]
