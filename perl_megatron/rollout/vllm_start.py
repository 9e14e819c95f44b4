"""Starts vLLM in the trainer's process, and keeps it from changing the process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.rollout.engine import INSTALL_VLLM, vllm_obstacle
from perl_megatron.runtime import environment, garbage, platform
from perl_megatron.runtime.topology import Topology

MAX_TEMPERATURE = 2.0
"""vLLM refuses more."""

CPU_BATCHED_TOKENS = 8192
"""Prompt tokens of one step on a CPU, at least."""


def check(config: RolloutConfig, topology: Topology, tensor_parallel_size: int) -> None:
    """Raise UserError if vLLM cannot run here or a setting does not suit it."""
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


def arguments(
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
        {"gpu_memory_utilization": config.gpu_memory_fraction, "enable_sleep_mode": config.sleep_mode}
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
        "disable_log_stats": False,  # counts hits of the prefix cache
        "mm_processor_cache_gb": 0,  # an image is prepared again for each of its few views: little against memory held
    }


def layout(world_size: int, tensor_parallel_size: int) -> dict[str, Any]:
    """vLLM's arguments for replicas of so many ranks each."""
    if world_size == 1:
        return {}
    arguments: dict[str, Any] = {
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "external_launcher",
    }
    num_replicas = world_size // tensor_parallel_size
    return arguments | ({"data_parallel_size": num_replicas} if num_replicas > 1 else {})


def start(arguments: dict[str, Any]) -> Any:
    """A ``vllm.LLM``."""
    try:
        with garbage.paused():
            from vllm import LLM

            _spare_process_group()
            if not platform.is_cuda():
                register_model_class()
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


def register_model_class() -> None:
    """Show vLLM the model's class in this process.

    It would look at the class in a process of its own (so as not to initialise CUDA here), where torchvision cannot be
    imported beside a CPU torch (see ``runtime/torchvision_schema.py``), and where each rank spends ten seconds.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    ModelRegistry.register_model("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration)


@contextlib.contextmanager
def preserved_process() -> Iterator[None]:
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
