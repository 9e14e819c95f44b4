"""The reference: transformers, one unpadded sequence at a time, whole in one process, on the CPU.

In float64 it says what is right; in the working dtype it says how much of that a correct program loses by rounding,
which is what tolerances are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from perl_megatron.checkpoint.qwen25_vl_table import published_name
from perl_megatron.runtime.collective import shared_map_on_rank_zero
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.verification.layout import IMAGE_TOKEN
from perl_megatron.verification.tiny import TinyImages

Named = dict[str, Tensor]
"""By published name."""


@dataclass(frozen=True)
class Evaluation:
    """What one program computes with one set of weights in one dtype; all tensors float64."""

    log_probs: list[Tensor]
    """[R] for each sequence."""
    gradients: Named
    """Of GRPO's loss at ratio 1, clipped."""
    gradient_norm: float
    """Before clipping."""


@dataclass(frozen=True)
class Reference:
    """transformers in float64 and in the working dtype."""

    exact: Evaluation
    rounded: Evaluation


def compute_reference(
    folder: Path, sequences: Sequence[TrainingSequence], images: TinyImages, dtype: torch.dtype, max_norm: float
) -> Reference | None:
    """One step of GRPO at ratio 1, up to the gradient that is clipped at ``max_norm``, on the policy in ``folder``.

    Collective: two ranks share the work, and rank 0 gets the result; None elsewhere.
    """

    def evaluate(dtype: torch.dtype) -> Evaluation:
        return _evaluate(folder, sequences, images, dtype, max_norm)

    evaluations = shared_map_on_rank_zero(evaluate, (torch.float64, dtype))
    return None if evaluations is None else Reference(*evaluations)


def _evaluate(
    folder: Path, sequences: Sequence[TrainingSequence], images: TinyImages, dtype: torch.dtype, max_norm: float
) -> Evaluation:
    model = _load(folder, dtype)
    parameters = {published_name(name): parameter for name, parameter in model.named_parameters()}
    # Low precision trains with main weights and gradients in float32, here as in megatron-core.
    main_dtype = torch.promote_types(dtype, torch.float32)
    main = {name: parameter.detach().to(main_dtype) for name, parameter in parameters.items()}
    log_probs = _accumulate(model, parameters, main, sequences, images)
    norm = torch.nn.utils.clip_grad_norm_(main.values(), max_norm).item()
    gradients = {name: _gradient(weight).double() for name, weight in main.items()}
    return Evaluation(log_probs, gradients, norm)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    # Its kernel is a whole patch, so it is a matrix product. As a convolution torch has it, on a CPU without bfloat16
    # instructions, at a tenth of the speed: two thirds of all that the reference takes in bfloat16.
    convolution = model.model.visual.patch_embed.proj
    convolution.forward = lambda patches: linear(patches.flatten(1), convolution.weight.flatten(1))
    return model


def _accumulate(
    model: Any, parameters: Named, main: Named, sequences: Sequence[TrainingSequence], images: TinyImages
) -> list[Tensor]:
    """Set the main weights' gradients to those of GRPO's loss at ratio 1, summed over the sequences.

    The loss is -Σ advantage · log-probability over the number of response tokens. Returns the log-probabilities,
    float64 [R] each.
    """
    num_tokens = sum(len(sequence.response) for sequence in sequences)
    for weight in main.values():
        weight.grad = torch.zeros_like(weight)
    log_probs = []
    for sequence in sequences:
        log_prob = _log_prob(model, sequence, images)
        (log_prob.sum() * (-sequence.advantage / num_tokens)).backward()
        log_probs.append(log_prob.detach().double())
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                _gradient(main[name]).add_(parameter.grad)
                parameter.grad = None
    return log_probs


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _log_prob(model: Any, sequence: TrainingSequence, images: TinyImages) -> Tensor:
    """[R], differentiable; transformers makes its own positions. From float32 logits at least."""
    prompt = sequence.prompt
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, sequence.response]))[None]
    pixels: dict[str, Tensor] = {}
    if prompt.image_keys:
        patches = np.concatenate([images.patches(key) for key in prompt.image_keys])
        pixels = {
            "pixel_values": torch.from_numpy(patches).to(model.dtype),
            "image_grid_thw": torch.from_numpy(prompt.grids),
        }
    types = (ids == IMAGE_TOKEN).int()
    logits = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, **pixels).logits[0]
    count = len(sequence.response)
    log_probs = logits[-count - 1 : -1].to(torch.promote_types(model.dtype, torch.float32)).log_softmax(-1)
    return log_probs.gather(-1, ids[0, -count:, None])[:, 0]
