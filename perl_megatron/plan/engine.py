"""What the rollout engine needs of a device's memory, and what it makes of it. No torch.

vLLM takes `rollout.gpu_memory_fraction` of the device at its start: for its share of the weights, for one step of the
most tokens and images that it may take together (its multimodal budget), for CUDA graphs, and what is left for keys and
values. The embedded engine is a whole model in each process.
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
class EngineMemory:
    """Bytes of one engine rank's device."""

    tensor_size: int
    """Ranks that one engine is spread over."""
    colocated: float
    """What it takes of a trainer's device: nothing where servers have their own."""
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
    per_token = 2 * numbers.num_layers * numbers.num_kv_heads * numbers.head_dim * wide / tensor
    if derived.engine == "embedded":
        # One batch of views, each with all its rollouts.
        sequences = derived.rollouts_per_view
        cache = sequences * (prompt_tokens + response_tokens) * per_token
        return EngineMemory(1, weights + cache, weights + cache, weights, 0, 0, 0, per_token, cache, sequences, True)
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
    of_view = prompt_tokens + derived.rollouts_per_view * response_tokens
    sequences = int(derived.rollouts_per_view * tokens / of_view)
    return EngineMemory(
        tensor_size=tensor,
        colocated=0.0 if derived.engine == "server" else reserve,
        reserve=reserve,
        weights=weights,
        multimodal=multimodal,
        step=step,
        fixed=fixed,
        cache_per_token=per_token,
        cache=cache,
        concurrent_sequences=max(0, min(sequences, rollout.max_concurrent_sequences)),
        longest_fits=tokens >= derived.max_sequence_tokens,
    )


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
