"""What the rollout engine needs of a device's memory, and what it makes of it. No torch.

vLLM takes `rollout.gpu_memory_fraction` of the device at its start: for its share of the weights, for one step of the
most tokens and images that it may take together (its multimodal budget), for CUDA graphs, and what is left for keys and
values. The embedded engine is a whole model in each process.

While the trainer works on a GPU a colocated engine sleeps (`rollout.sleep_mode`): vLLM at level 1, as its 0.32 does by
default (device_allocator/sleep_mode_backend.py): weights go to host memory, the cache and the workspaces of kernels are
dropped, CUDA graphs (config/model.py: sleep_mode_offload_cudagraph is off) and NCCL's buffers stay. An update takes the
memory of the weights first, and that of the cache when it is over.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from perl_megatron.batching.cost import CostModel
from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.plan.activations import bytes_of_number
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.gpus import GIB, Gpu
from perl_megatron.plan.parameters import total_count


@dataclass(frozen=True)
class EngineShare:
    """Bytes that an engine takes of the device of a trainer's rank; none where it has its own."""

    generate: float = 0.0
    sync: float = 0.0
    """While weights are brought."""
    update: float = 0.0
    """While the trainer computes log-probabilities and updates."""
    host: float = 0.0
    """Of host memory, meanwhile."""

    @property
    def sleeps(self) -> bool:
        """Whether it gives memory back."""
        return self.update < self.generate


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one engine rank's device."""

    tensor_size: int
    """Ranks that one engine is spread over."""
    share: EngineShare
    """What it takes of a trainer's device."""
    reserve: float
    """All that it takes of its device."""
    weights: float
    multimodal: float
    """Of the images of one step: their features in the encoder cache, and the tower's activations."""
    step: float
    """Activations of one step of the language model."""
    fixed: float
    cache_per_token: float
    """Keys and values of one token."""
    cache: float
    """What is left for keys and values; below 0 where there is not enough."""
    concurrent_sequences: int
    """Sequences of mean length, prompts of a view once, that fit into it; at most rollout.max_concurrent_sequences."""
    longest_fits: bool
    """Whether one sequence of the largest size fits into it."""
    enough: float
    """Reserve with which it could work on rollout.max_concurrent_sequences at once."""

    def as_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)


def engine_memory(
    config: Config,
    derived: Derived,
    numbers: ArchitectureNumbers,
    gpu: Gpu,
    assumptions: Assumptions,
    *,
    device_bytes: float,
    prompt_tokens: int,
    response_tokens: int,
) -> EngineMemory:
    """Of the engine that the config means, on devices of ``device_bytes``."""
    rollout, wide = config.rollout, bytes_of_number(config)
    tensor = (rollout.tensor_parallel or 1) if derived.engine == "server" else derived.engine_tensor_size
    weights = wide * total_count(numbers) / tensor
    # Ranks beyond the key-value heads hold copies of them (vLLM, config/model.py: get_num_kv_heads).
    heads = max(1, numbers.num_kv_heads // tensor)
    per_token: float = 2 * numbers.num_layers * heads * numbers.head_dim * wide
    if derived.engine == "embedded":
        # One batch of views, each with all its rollouts.
        sequences = derived.rollouts_per_view
        cache = sequences * (prompt_tokens + response_tokens) * per_token
        reserve = weights + cache
        share = _share(config, derived, gpu, reserve, weights, 0.0)
        return EngineMemory(1, share, reserve, weights, 0, 0, 0, per_token, cache, sequences, True, reserve)
    most_tokens = max(assumptions.engine_batched_tokens, derived.max_sequence_tokens)
    multimodal, step = _step_memory(config, numbers, most_tokens, tensor, wide)
    if gpu.is_cpu:
        fixed, cache = 0.0, rollout.cpu_cache_gib * GIB
        reserve = weights + multimodal + step + cache
    else:
        fixed = assumptions.engine_fixed_gib * GIB
        reserve = rollout.gpu_memory_fraction * device_bytes
        cache = reserve - weights - multimodal - step - fixed
    tokens = cache / per_token
    of_sequence = prompt_tokens / derived.rollouts_per_view + response_tokens
    sequences = int(tokens / of_sequence)
    tokens_of_all = max(rollout.max_concurrent_sequences * of_sequence, derived.max_sequence_tokens)
    return EngineMemory(
        tensor_size=tensor,
        share=_share(config, derived, gpu, reserve, weights, fixed),
        reserve=reserve,
        weights=weights,
        multimodal=multimodal,
        step=step,
        fixed=fixed,
        cache_per_token=per_token,
        cache=cache,
        concurrent_sequences=max(0, min(sequences, rollout.max_concurrent_sequences)),
        longest_fits=tokens >= derived.max_sequence_tokens,
        enough=weights + multimodal + step + fixed + tokens_of_all * per_token,
    )


def _share(config: Config, derived: Derived, gpu: Gpu, reserve: float, weights: float, fixed: float) -> EngineShare:
    """What an engine of this size takes of a trainer's device."""
    if derived.engine == "server":
        return EngineShare()
    if not config.rollout.sleep_mode or gpu.is_cpu:
        return EngineShare(reserve, reserve, reserve)
    return EngineShare(reserve, sync=weights + fixed, update=fixed, host=weights)


def _step_memory(
    config: Config, numbers: ArchitectureNumbers, most_tokens: float, tensor: int, wide: int
) -> tuple[float, float]:
    """(multimodal budget, activations) of a step of the most tokens, all of them image tokens as vLLM profiles it."""
    image_tokens = min(most_tokens, config.data.max_prompt_tokens)
    features = wide * most_tokens * numbers.vision_out_hidden_size
    patches = image_tokens * CostModel(numbers).patches_of_a_token
    tower = wide * patches * (4 * numbers.vision_hidden_size + 3 * numbers.vision_ffn_size / tensor)
    tower += wide * patches * numbers.vision_patch_values
    step = wide * most_tokens * (4 * numbers.hidden_size + 3 * numbers.ffn_size / tensor)
    # The logits of the sequences that a step samples for, and their float32 copies.
    step += 10 * config.rollout.max_concurrent_sequences * numbers.vocabulary_size
    return features + tower, step
