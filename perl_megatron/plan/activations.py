"""What a micro-batch keeps for its backward pass, in numbers per rank. No torch.

Counted from the policy as it is built (``model/``): the tensors that autograd saves, each once, with torch's own
modules (read off with ``saved_tensors_hooks``; a test holds it) and, by its sources, with Transformer Engine's. For a
token, H, F, Q, K as in ``parameters``, h heads, t the tensor-parallel size, t' the same under sequence parallelism,
without it 1:

| | torch's modules | Transformer Engine's |
|---|---|---|
| two norms: input, (input · 1/rms), output | 6H/t' | 4H/t' |
| queries, result of the attention, input of its output product | 3Q/t | 3Q/t |
| keys and values, in packed rows gathered for prompts and for each response | 2K/t a key | 2K/t a key, (Q + 3K)/t |
| the same in padded rows, where the result is the input of the product | 3K/t | 3K/t |
| gate and up, SiLU, up + 0, their product | 5F/t | 5F/t |
| log-sum-exp of the attention, float32 | h/t | h/t |

`recompute: selective` computes the attention again (queries, keys and values before it stay: (3Q + 3K)/t); `full` keeps
each layer's input only, and one layer at a time is as without. A block of the vision tower is the same with its widths
(Q = K = D: 12D + 5E).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.schema import Config
from perl_megatron.plan.parameters import padded_vocabulary, trained_parts
from perl_megatron.plan.workload import MicroBatchSize, largest_image, most_patches

Modules = Literal["torch", "transformer_engine"]
SINGLE = 4
"""Bytes of a float32 number."""


@dataclass(frozen=True)
class Activations:
    """Of one rank, in bytes."""

    layer: float
    """What a layer of the language model keeps of a micro-batch."""
    layer_work: float
    """What a layer has beside that while it runs backwards, with recomputation all that it made again."""
    vision: float
    """What tower and merger keep of a micro-batch, its pixels included."""
    vision_work: float
    head: float
    """Final norm and hidden states of the outputs, kept of a micro-batch."""
    loss_work: float
    """What the loss kernel allocates for a micro-batch: tiles, sums, and a float32 gradient of the hidden states."""


def bytes_of_number(config: Config) -> int:
    """Of a parameter or an activation."""
    return {"float32": 4, "bfloat16": 2}[config.model.dtype]


def activations(config: Config, numbers: ArchitectureNumbers, size: MicroBatchSize, modules: Modules) -> Activations:
    """What a rank of each kind of stage keeps of a micro-batch."""
    kept, work = _layer(config, numbers, size, modules)
    vision, vision_work = _vision(config, numbers, size, modules)
    head, loss_work = _head(config, numbers, size, modules)
    return Activations(kept, work, vision, vision_work, head, loss_work)


def _layer(config: Config, numbers: ArchitectureNumbers, size: MicroBatchSize, modules: Modules) -> tuple[float, float]:
    parallel, wide = config.parallel, bytes_of_number(config)
    tensor, context = parallel.tensor, parallel.context
    tokens = size.tokens / context
    hidden = tokens * numbers.hidden_size / (tensor if parallel.sequence else 1)
    query = tokens * numbers.num_heads * numbers.head_dim / tensor
    key = tokens * numbers.num_kv_heads * numbers.head_dim / tensor
    ffn = tokens * numbers.ffn_size / tensor
    sums = SINGLE * tokens * numbers.num_heads / tensor
    norms = (6 if modules == "torch" else 4) * hidden
    if config.actor.sharing == "full":
        keys = size.prompt_tokens + size.response_keys
        attention = 3 * query + 2 * keys * numbers.num_kv_heads * numbers.head_dim / tensor
        if modules == "transformer_engine":  # whose prompts' keys are views of the fused product
            attention += query + 3 * key
    else:
        # Context ranks gather the keys and values of all, and torch's take a mask of numbers with them.
        attention = 3 * query + 3 * key + (2 * key * context if context > 1 else 0)
    before_attention = 3 * query + 3 * key
    whole = wide * (norms + attention + 5 * ffn) + sums
    gradients = wide * (4 * ffn + 2 * hidden)
    if config.model.recompute == "full":
        return wide * hidden, whole - wide * hidden + gradients
    if config.model.recompute == "selective":
        return wide * (norms + before_attention + 5 * ffn), max(gradients, wide * (attention + 2 * query) + sums)
    return whole, gradients


def _vision(
    config: Config, numbers: ArchitectureNumbers, size: MicroBatchSize, modules: Modules
) -> tuple[float, float]:
    parallel, wide, trained = config.parallel, bytes_of_number(config), trained_parts(config.optimizer)
    is_sharded = parallel.vision == "sharded"
    tensor = parallel.tensor if is_sharded else 1
    patches: float = size.patches
    if not is_sharded:
        patches = most_patches(size.patches, largest_image(config, numbers), parallel.tensor)
    width, ffn = patches * numbers.vision_hidden_size, patches * numbers.vision_ffn_size
    cells = patches / numbers.vision_merge_size**2
    pixels = float(SINGLE * size.patches * numbers.vision_patch_values)
    if wide != SINGLE:
        pixels += wide * patches * numbers.vision_patch_values
    norms = 6 if modules == "torch" else 4
    sums = SINGLE * patches * numbers.vision_num_heads / tensor
    whole = wide * (norms * width + (6 * width + 5 * ffn) / tensor) + sums
    gradients = wide * (4 * ffn / tensor + 2 * width)
    kept = {
        "none": whole,
        "selective": wide * (norms * width + (6 * width + 5 * ffn) / tensor),
        "full": wide * width,
    }[config.model.recompute]
    work = gradients + (whole - kept if config.model.recompute != "none" else 0)
    # The merger: norm, cells in order, two products with GELU between.
    features = wide * size.image_tokens * numbers.vision_out_hidden_size
    merger = wide * (
        (norms // 2 - 1) * width + width + 2 * width / tensor
    )  # the norm's output goes when it is in order
    merger += 2 * wide * cells * numbers.vision_out_hidden_size
    if "vision" in trained:
        return pixels + numbers.vision_depth * kept + merger + features, work
    if "merger" in trained:
        return pixels + merger + features, whole
    return pixels + features, whole  # no backward pass: one block at a time


def _head(config: Config, numbers: ArchitectureNumbers, size: MicroBatchSize, modules: Modules) -> tuple[float, float]:
    parallel, wide = config.parallel, bytes_of_number(config)
    hidden = numbers.hidden_size
    tokens, outputs = size.tokens / parallel.context, size.outputs / parallel.context
    sharded = parallel.tensor if parallel.sequence else 1
    # The norm's output goes when those of the outputs are taken from it.
    kept = wide * ((2 if modules == "torch" else 1) * tokens * hidden / sharded + outputs * hidden)
    if parallel.sequence:
        kept += wide * tokens * hidden  # gathered again for the loss
    rows = padded_vocabulary(numbers, parallel.tensor) // parallel.tensor
    if config.model.loss_kernel == "reference":
        return kept, outputs * rows * (wide + 3 * SINGLE)
    gradient = SINGLE * outputs * hidden + wide * outputs * hidden
    return kept, gradient + _tile(rows, outputs, hidden, modules) + 8 * SINGLE * outputs


def _tile(rows: float, outputs: float, hidden: int, modules: Modules) -> float:
    """Of the logits: `kernels/triton_settings.py` and `kernels/tiles.py`; and a tile of the weight in float32."""
    if modules == "transformer_engine":
        return min(outputs, 4096) * min(rows, 4096) * 2 + min(rows, 4096) * hidden * SINGLE
    tokens = 512 if rows >= 8192 else 128
    return 2 * tokens * min(rows, 2048) * SINGLE + 2 * min(rows, 2048) * hidden * SINGLE
