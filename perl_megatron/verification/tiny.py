"""The tiny policy's weights, and a batch of multi-image sequences with their pixels; no tokenizer, no image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.vision_input import PATCHES_PER_CELL
from perl_megatron.types import EncodedPrompt
from perl_megatron.verification.layout import IMAGE_TOKEN, NUM_LAYERS, VISION_END, VISION_START, policy_config

PATCH_VALUES = 1176
FIRST_WORD, LAST_WORD = 3, 290
"""Ids of text tokens."""
GRIDS = ((1, 4, 6), (1, 10, 8), (1, 2, 2), (1, 2, 2), (1, 6, 4))
"""Five images of four sizes: (time, height, width) in patches."""
ORDERS = ((0, 1), (1, 0), (2, 3, 4), (4, 2, 2, 3), (), (), (3,), (0, 3))
"""The images of each prompt: shared in several orders, one twice in a prompt, and two prompts without any, long enough
to leave micro-batches (and over four replicas a rank) without images."""
ANSWERED_AGAIN = (0, 2, 2, 4, 0)
"""The sequences whose prompts have more responses, in groups of different sizes; the last response is one token."""


class TinyImages:
    """What the trainer asks of a `PromptEncoder`: pixels by content key, and special token ids."""

    pad_token_id = 0
    banned_token_ids: tuple[int, ...] = ()

    def __init__(self, seed: int = 0):
        random = np.random.default_rng([seed, 1])
        self._patches = {
            str(image): random.standard_normal((t * h * w, PATCH_VALUES), dtype=np.float32)
            for image, (t, h, w) in enumerate(GRIDS)
        }

    def patches(self, key: str) -> np.ndarray:
        """float32 [t·h·w, 1176]."""
        return self._patches[key]


def tiny_config(*, tied: bool, num_layers: int = NUM_LAYERS) -> Any:
    """transformers' configuration of the tiny policy."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig.from_dict(policy_config(tied, num_layers))


def tiny_model(*, tied: bool, num_layers: int = NUM_LAYERS, seed: int = 0) -> Any:
    """transformers' model in float32.

    Every parameter is random, norms and biases too, and large enough that logits differ by several nats.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(tiny_config(tied=tied, num_layers=num_layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name or "ln_q" in name else 0.0))
            else:
                parameter.copy_(noise * (1.5 if "embed_tokens" in name else 1.0) * parameter[0].numel() ** -0.5)
    return model


def write_policy(folder: Path, *, tied: bool, num_layers: int, dtype: torch.dtype) -> None:
    """A Hugging Face folder of the tiny policy, its weights rounded to ``dtype``."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tiny_model(tied=tied, num_layers=num_layers).to(dtype).save_pretrained(folder)


def tiny_sequences(seed: int = 0) -> list[TrainingSequence]:
    """A response to each of ``ORDERS`` and more to some, with an advantage and without log-probabilities."""
    random = np.random.default_rng([seed, 2])
    prompts = [_make_prompt(images, random) for images in ORDERS]
    prompts += [prompts[index] for index in ANSWERED_AGAIN]
    lengths = [*random.integers(3, 9, len(prompts) - 1).tolist(), 1]
    return [
        TrainingSequence(prompt, np.array(_words(length, random)), advantage=float(random.standard_normal()))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def _words(count: int, random: np.random.Generator) -> list[int]:
    return random.integers(FIRST_WORD, LAST_WORD, count).tolist()


def _make_prompt(images: tuple[int, ...], random: np.random.Generator) -> EncodedPrompt:
    def words(count: int) -> list[int]:
        return _words(count, random)

    tokens, starts = words(4 if images else 120), []
    for image in images:
        tokens.append(VISION_START)
        starts.append(len(tokens))
        tokens += [IMAGE_TOKEN] * (int(np.prod(GRIDS[image])) // PATCHES_PER_CELL) + [VISION_END]
        tokens += words(int(random.integers(0, 4)))
    tokens += words(3)
    return EncodedPrompt(
        token_ids=np.array(tokens, dtype=np.int64),
        compact_ids=(),
        image_starts=tuple(starts),
        grids=np.array([GRIDS[image] for image in images], dtype=np.int64).reshape(-1, 3),
        image_keys=tuple(map(str, images)),
    )
