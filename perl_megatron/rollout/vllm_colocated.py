"""The vLLM engine, colocated: it runs in the trainer's own processes, on the same device, between the updates.

Under torchrun, ``tensor_parallel_size`` neighbouring ranks form one replica (vLLM's external launcher: every rank runs
the same deterministic scheduler), the replicas share the views, and weights are handed over in the process. Without
torchrun it is one in-process engine.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.rollout.engine import BANNED_LOGIT_BIAS, INSTALL_VLLM, Sampling, SyncReport, vllm_obstacle
from perl_megatron.rollout.ledger import WeightLedger, digest_weights
from perl_megatron.runtime import collective, environment, platform, rng
from perl_megatron.runtime.topology import Topology
from perl_megatron.types import EncodedPrompt, Rollout, View

MAX_TEMPERATURE = 2.0
"""vLLM refuses more."""


CPU_BATCHED_TOKENS = 8192
"""Prompt tokens of one step on a CPU, at least."""


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
        _check(config, topology, tensor_parallel_size)
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
        self._digest: str | None = None
        self.weight_version = 0
        with _preserved_process():
            self._llm = _start(
                _arguments(
                    config,
                    encoder=encoder,
                    model_path=model_path,
                    seed=seed,
                    dtype=dtype,
                    max_model_length=max_model_length,
                    max_images=max_images,
                )
                | _layout(topology.world_size, tensor_parallel_size)
            )

    def generate(
        self, views: Sequence[View], prompts: Sequence[EncodedPrompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See ``RolloutEngine``; one request for each view, all submitted together."""
        assert len(views) == len(prompts) == len(seeds)
        mine = range(self._replica, len(views), self._num_replicas)
        requests = [self._request(prompts[index]) for index in mine]
        parameters = [self._sampling_parameters(sampling, seeds[index]) for index in mine]
        with _preserved_process():
            # What is cached from another call would change the float rounding of this one, and so now and then a token.
            self._drop_caches()
            outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        rollouts = [
            [self._rollout(views[index], completion) for completion in output.outputs]
            for index, output in zip(mine, outputs, strict=True)
        ]
        for index, output in zip(mine, outputs, strict=True):
            assert np.array_equal(output.prompt_token_ids, prompts[index].token_ids), (
                "vLLM expanded the images otherwise"
            )
        shares = collective.gather_objects(rollouts if self._leads_replica else None)
        by_view = collective.interleave([share for share in shares if share is not None], len(views))
        return [rollout for of_view in by_view for rollout in of_view]

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Reload the weights in place from the stream; see ``RolloutEngine``."""
        ledger = WeightLedger(self._names, dtype=self._dtype)
        with _preserved_process():
            if platform.is_cuda():
                self._llm.wake_up(tags=["weights"])
            self._llm.sleep(level=0)  # no request may run while the weights are a mixture
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": ledger.watch(weights)})
            report = ledger.close(version)
            if self._tied and not platform.is_cuda():
                self._llm.apply_model(_repack_output_layer)
            self._drop_caches()
            self.wake()
        self._digest = ledger.digest()
        self.weight_version = version
        return report

    def sleep(self) -> None:
        """On a GPU: weights to host memory, key-value cache discarded (level 1; level 2 corrupts vision towers)."""
        if platform.is_cuda():
            self._llm.sleep(level=1)

    def wake(self) -> None:
        """Take the device memory again and go on scheduling."""
        self._llm.wake_up(tags=["weights", "kv_cache", "scheduling"] if platform.is_cuda() else ["scheduling"])

    def digest(self) -> str:
        """Digest of the weights that vLLM was given last (it keeps them fused and repacked)."""
        if self._digest is None:
            self._digest = digest_weights(self._names, self._checkpoint.__getitem__, dtype=self._dtype)
        return self._digest

    def close(self) -> None:
        """Stop vLLM; the trainer's process group stays."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

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

        return SamplingParams(
            n=sampling.num_rollouts,
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
            max_tokens=sampling.max_tokens,
            # vLLM adds the rollout's number: neighbouring seeds would share streams, and the sum must fit 63 bits.
            seed=rng.derive_seed(seed, "rollouts") >> 1,
            logprobs=0,  # that of the sampled token, nothing else
            logit_bias=dict.fromkeys(self._encoder.banned_token_ids, BANNED_LOGIT_BIAS),
            stop_token_ids=list(self._encoder.end_token_ids),
            detokenize=False,
        )

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
            weight_version=self.weight_version,
        )


def _repack_output_layer(model: torch.nn.Module) -> None:
    """Make a tied output layer follow the embedding that was reloaded.

    On a CPU vLLM multiplies by a repacked copy of each matrix. Its reload repacks the layers that got a weight; a tied
    output layer shares the embedding's weight and gets none of its own, so its copy stays that of the old policy
    (seen with vLLM 0.32: log-probabilities off by up to 0.2 nats after a few updates).
    """
    head = model.get_submodule("language_model.lm_head")
    head.quant_method.process_weights_after_loading(head)  # type: ignore[union-attr,operator]


def _check(config: RolloutConfig, topology: Topology, tensor_parallel_size: int) -> None:
    obstacle = vllm_obstacle(cuda=platform.is_cuda())
    if obstacle is not None:
        raise UserError(obstacle, where="rollout.engine", fix=f"{INSTALL_VLLM}, or set rollout.engine=embedded")
    if config.temperature > MAX_TEMPERATURE:
        raise UserError(
            f"vLLM samples at a temperature of at most {MAX_TEMPERATURE}, not {config.temperature}",
            where="rollout.temperature",
            fix="lower it, or set rollout.engine=embedded",
        )
    assert topology.world_size % tensor_parallel_size == 0, (topology.world_size, tensor_parallel_size)


def _arguments(
    config: RolloutConfig,
    *,
    encoder: PromptEncoder,
    model_path: Path | str,
    seed: int,
    dtype: torch.dtype,
    max_model_length: int,
    max_images: int,
) -> dict[str, Any]:
    """vLLM's arguments, but for the layout of the ranks."""
    size = {"shortest_edge": encoder.min_pixels, "longest_edge": encoder.max_pixels}
    device: dict[str, Any] = (
        {"gpu_memory_utilization": config.gpu_memory_fraction, "enable_sleep_mode": True}
        if platform.is_cuda()
        else {
            "kv_cache_memory_bytes": int(config.cpu_cache_gib * 2**30),
            "enforce_eager": True,
            # A prompt cut over two steps makes vLLM rewind its seeded generator, which a CPU generator cannot do.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_model_length),
            # The cache's size is given: no need to run the largest possible images once at the start.
            "skip_mm_profiling": True,
        }
    )
    return device | {
        "model": str(model_path),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "max_model_len": max_model_length,
        "max_num_seqs": config.max_concurrent_sequences,
        "limit_mm_per_prompt": {"image": max_images, "video": 0},
        "mm_processor_kwargs": {"size": size},  # the encoder's bounds: an image must not be resized a second time
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "enable_prefix_caching": True,  # the rollouts of a view share its prompt
        "use_tqdm_on_load": False,
        "mm_processor_cache_gb": 0,  # each image is sent once a call; the cache would only hold memory
    }


def _layout(world_size: int, tensor_parallel_size: int) -> dict[str, Any]:
    if world_size == 1:
        return {}
    layout: dict[str, Any] = {
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "external_launcher",
    }
    num_replicas = world_size // tensor_parallel_size
    return layout | ({"data_parallel_size": num_replicas} if num_replicas > 1 else {})


def _start(arguments: dict[str, Any]) -> Any:
    try:
        from vllm import LLM

        _spare_process_group()
        if not platform.is_cuda():
            _register_model_class()
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported: {error}",
            where="rollout.engine",
            fix=f"{INSTALL_VLLM}, or set rollout.engine=embedded",
        ) from error
    return LLM(**arguments)


def _spare_process_group() -> None:
    """Keep vLLM, when it shuts down or is collected, from destroying the process group that the trainer made."""
    from vllm.distributed import parallel_state
    from vllm.v1.engine import core

    if torch.distributed.is_initialized() and hasattr(core, "cleanup_dist_env_and_memory"):
        core.cleanup_dist_env_and_memory = parallel_state.destroy_model_parallel


def _register_model_class() -> None:
    """Show vLLM the model's class in this process.

    It would look at the class in a process of its own (so as not to initialise CUDA here), where torchvision cannot be
    imported beside a CPU torch (see ``runtime/torchvision_schema.py``), and where each rank spends ten seconds.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    ModelRegistry.register_model("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration)


@contextlib.contextmanager
def _preserved_process() -> Iterator[None]:
    """Leave the trainer's process as it was.

    vLLM seeds all global generators on start and draws from torch's in every step, makes ``torch.set_num_threads`` a
    function that does nothing (CPU), and changes the environment.
    """
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    grad_enabled, default_dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if platform.is_cuda() else []
    try:
        with torch.random.fork_rng(devices=devices), environment.vllm_leaves_alone():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        torch.set_grad_enabled(grad_enabled)
        torch.set_default_dtype(default_dtype)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
