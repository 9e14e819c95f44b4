"""The vLLM engine, colocated: it runs in the trainer's own processes, on the same device, between the updates.

Under torchrun, ``tensor_parallel_size`` neighbouring ranks form one replica (vLLM's external launcher: every rank runs
the same deterministic scheduler), the replicas share the views, and weights are handed over in the process. Without
torchrun it is one in-process engine.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.rollout import vllm_holdings, vllm_start
from perl_megatron.rollout.attestation import Attestor, Place, add_up, uncovered, without_raising
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.rollout.digest import digest
from perl_megatron.rollout.engine import Sampling, SyncReport
from perl_megatron.rollout.ledger import WeightLedger
from perl_megatron.rollout.shares import shares_of
from perl_megatron.rollout.vllm_counters import VllmCounters
from perl_megatron.rollout.vllm_sampling import sampling_settings
from perl_megatron.rollout.vllm_start import preserved_process
from perl_megatron.runtime import collective, environment, platform
from perl_megatron.runtime.topology import Topology
from perl_megatron.types import EncodedPrompt, Rollout, View

MEMORY = ("weights", "kv_cache")
"""vLLM's names of what a sleeping engine has given back, in the order in which it takes it again."""


class VllmColocatedEngine:
    """``RolloutEngine`` on vLLM in the trainer's processes."""

    name = "vllm"

    def __init__(
        self,
        config: RolloutConfig,
        *,
        encoder: PromptEncoder,
        model_path: Path | str,
        topology: Topology,
        tensor_parallel_size: int,
        seed: int,
        dtype: torch.dtype,
        max_model_length: int,
        max_images: int,
    ):
        """Start vLLM on the checkpoint's weights; all ranks together, after the process group is initialised.

        ``max_model_length`` bounds prompt plus response in tokens, and ``max_images`` the images of a prompt. Raises
        UserError if vLLM cannot run here or a setting does not suit it.
        """
        vllm_start.check(config, topology, tensor_parallel_size)
        environment.prepare_vllm(cuda=platform.is_cuda())
        self._encoder = encoder
        self._dtype = dtype
        self._replica = topology.rank // tensor_parallel_size
        self._num_replicas = topology.world_size // tensor_parallel_size
        self._leads_replica = topology.rank % tensor_parallel_size == 0
        self._checkpoint = open_checkpoint(model_path)
        # Some tied checkpoints store the output layer too; the stream, as the model, has only the embedding.
        self._tied = read_architecture(model_path).tied_embeddings
        self._names = frozenset(self._checkpoint) - ({"lm_head.weight"} if self._tied else frozenset())
        self._attestation, self._full_every = config.attestation, config.full_attestation_every
        self._num_updates = self.weight_version = 0
        self._given_back: tuple[str, ...] = ()
        with preserved_process():
            self._llm = vllm_start.start(
                vllm_start.arguments(
                    config,
                    encoder=encoder,
                    model_path=model_path,
                    seed=seed,
                    dtype=dtype,
                    max_model_length=max_model_length,
                    max_images=max_images,
                )
                | vllm_start.layout(topology.world_size, tensor_parallel_size)
            )
        self._model: torch.nn.Module = self._llm.apply_model(lambda model: model)[0]
        self._attestor: Attestor | None = None if self._attestation == "off" else self._new_attestor()
        self._counters = VllmCounters(self._llm, self._model)
        self._cache_use = CacheUse()

    def generate(
        self, views: Sequence[View], prompts: Sequence[EncodedPrompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See ``RolloutEngine``; one request for each view, all submitted together."""
        assert len(views) == len(prompts) == len(seeds)
        assert not self._given_back, "the engine is asleep: vLLM would wait for itself without end"
        mine = shares_of(views, self._num_replicas)[self._replica]
        requests = [self._request(prompts[index]) for index in mine]
        parameters = [self._sampling_parameters(sampling, seeds[index]) for index in mine]
        with preserved_process():
            # What is cached from another call would change the float rounding of this one, and so now and then a token.
            self._drop_caches()
            outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        rollouts = {}
        for index, output in zip(mine, outputs, strict=True):
            assert np.array_equal(output.prompt_token_ids, prompts[index].token_ids), (
                "vLLM expanded the images otherwise"
            )
            rollouts[index] = [self._rollout(views[index], completion) for completion in output.outputs]
        cached_tokens, encoded_images = self._counters.take()
        use = CacheUse.of_prompts([prompts[index] for index in mine], sampling.num_rollouts)
        use = replace(use, cached_tokens=cached_tokens, encoded_images=encoded_images)
        by_view: dict[int, list[Rollout]] = {}
        for share, use_of_share in collective.gather_objects(
            (rollouts, use) if self._leads_replica else ({}, CacheUse())
        ):
            by_view |= share
            self._cache_use += use_of_share
        return [rollout for index in range(len(views)) for rollout in by_view[index]]

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Reload the weights in place from the stream; see ``RolloutEngine``."""
        ledger = WeightLedger(self._names, dtype=self._dtype)
        stream = ledger.watch(weights)
        if self._attestor is not None:
            stream = self._attestor.watch(stream, version=version, full=self._attests_all())
        with preserved_process():
            # The cache's memory comes last, when that of the stream's buckets is free again (vLLM's documented order).
            self._take("weights")
            self._llm.sleep(level=0)  # schedule nothing: no request may run while the weights are a mixture
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
            report = ledger.close(version)
            vllm_holdings.renew_output_layer(self._model, tied=self._tied)
            report = replace(report, attest_seconds=self._attest(version))
            self._drop_caches()
            self.wake()
        self.weight_version = version
        self._num_updates += 1
        return report

    def sleep(self) -> None:
        """Weights to host memory, key-value cache discarded (level 1; level 2 corrupts vision towers).

        On a CPU vLLM gives no memory back, but goes through the same states. Needs `rollout.sleep_mode` on a GPU.
        """
        if not self._given_back:
            self._llm.sleep(level=1)
            self._given_back = MEMORY

    def wake(self) -> None:
        """Take what was given back, and go on scheduling."""
        self._take(*MEMORY)
        # Where memory was taken vLLM schedules again by itself, as soon as it has all of it; after level 0 it is told.
        self._llm.wake_up(tags=["scheduling"])

    def digest(self) -> str:
        """Digest of what vLLM computes with, read back from all ranks."""
        assert not self._given_back, "the engine is asleep: its weights have no memory on the device"
        attestor = self._attestor or self._new_attestor()
        with preserved_process():
            sums = add_up(pair for of_rank in collective.gather_objects(attestor.sums()) for pair in of_rank)
        return digest({name: self._checkpoint.info(name).shape for name in self._names}, sums)

    def take_cache_use(self) -> CacheUse:
        """See ``RolloutEngine``."""
        use, self._cache_use = self._cache_use, CacheUse()
        return use

    def close(self) -> None:
        """Stop vLLM; the trainer's process group stays."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm, self._model, self._attestor, self._counters
        gc.collect()

    def _take(self, *kinds: str) -> None:
        """Take those of ``kinds`` that were given back.

        A call of ``wake_up`` that names anything else takes nothing at all (vLLM 0.32, v1/executor/abstract.py: a
        warning, and the engine stays asleep).
        """
        tags = [kind for kind in kinds if kind in self._given_back]
        if tags:
            # vLLM takes memory from the driver, past torch's allocator, whose free blocks have to go back before. vLLM
            # 0.32 does that itself, which is documented nowhere.
            platform.release_cached_memory()
            self._llm.wake_up(tags=tags)
            self._given_back = tuple(kind for kind in self._given_back if kind not in tags)

    def _new_attestor(self) -> Attestor:
        """Knows where all weights are, on all ranks together; UserError if a number is nowhere, or one is unknown."""
        model = self._model
        attestor = Attestor(vllm_holdings.holdings(model, tied=self._tied), lambda: vllm_holdings.buffers(model))
        shapes = {name: self._checkpoint.info(name).shape for name in self._names}
        places: dict[int, list[Place]] = defaultdict(list)
        for replica, of_rank in collective.gather_objects((self._replica, attestor.places())):
            places[replica] += of_rank
        problems = [problem for of_replica in places.values() for problem in uncovered(shapes, of_replica)]
        if problems:
            raise UserError(
                f"vLLM's parameters are not understood: {'; '.join(problems[:5])}",
                where="rollout.attestation",
                fix="rollout.attestation=off, or another version of vLLM",
            )
        return attestor

    def _attests_all(self) -> bool:
        every = self._full_every
        return self._attestation == "full" or (every > 0 and self._num_updates % every == 0)

    def _attest(self, version: int) -> float:
        """Seconds; UserError, on all ranks, if any of them holds other numbers than were sent."""
        if self._attestor is None:
            return 0.0
        begin = time.perf_counter() - self._attestor.watch_seconds
        by_rank = collective.gather_objects(without_raising(self._attestor.problems))
        problems = [f"{text} (process {rank})" for rank, texts in enumerate(by_rank) for text in texts]
        if problems:
            raise UserError(
                f"after weight update {version} vLLM holds other numbers than it was sent, in {len(problems)} places: "
                f"{'; '.join(problems[:5])}",
                where="rollout.engine",
                fix="nothing sampled from these weights may be trained on; rollout.engine=embedded does without vLLM",
            )
        return time.perf_counter() - begin

    def _drop_caches(self) -> None:
        """Forget prompts' keys and values, processed images, and vision features (the engine's and the workers')."""
        is_reset = self._llm.reset_prefix_cache()
        assert is_reset, "the prefix cache is still in use"
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def _request(self, prompt: EncodedPrompt) -> dict[str, Any]:
        # A single image-pad id for each image: vLLM expands them itself, and would expand expanded ones again.
        request: dict[str, Any] = {"prompt_token_ids": list(prompt.compact_ids)}
        if prompt.image_keys:
            request["multi_modal_data"] = {"image": [self._encoder.image(key) for key in prompt.image_keys]}
        return request

    def _sampling_parameters(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(**sampling_settings(self._encoder, sampling, seed))

    def _rollout(self, view: View, completion: Any) -> Rollout:
        assert completion.finish_reason in ("stop", "length"), completion.finish_reason
        token_ids = np.array(completion.token_ids, dtype=np.int64)
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        return Rollout(
            view_index=view.index,
            token_ids=token_ids,
            logprob_rollout=np.array([candidates[token].logprob for token, candidates in pairs], dtype=np.float32),
            finish_reason=completion.finish_reason,
            text=self._encoder.decode(token_ids),
            weight_versions=np.full(len(token_ids), self.weight_version, dtype=np.int64),
        )
