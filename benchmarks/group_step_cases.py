"""The policies and groups of the group step's benchmark: one folder for a case, from which every side reads the same.

A group is what permuted GRPO trains on for one question: ``copies`` + 1 image orders, ``rollouts`` responses to each.
Weights, images and token ids are random, and the log-probabilities of the old policy lie around those that random
weights give, so that some tokens meet the clip bounds.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perl_megatron.data.processor import PromptEncoder
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.types import IMAGE_PLACEHOLDER, View

SYSTEM_PROMPT = "First think about the question inside <think> </think>. Then give the final answer inside \\boxed{}."
QUESTION = "Order the images from the smallest digit to the largest. Which image shows the digit 7? Answer: 3, 1, 2"


@dataclass(frozen=True)
class Shape:
    """Sizes of a policy."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    vision_hidden: int
    vision_ffn: int
    vision_heads: int
    vision_depth: int
    full_attention_blocks: tuple[int, ...]
    """Of the vision tower; the others attend within windows."""
    vocabulary: int
    kv_heads: int = 1


QUARTER_OF_3B = Shape(512, 2752, 8, 4, 320, 855, 4, 4, (3,), 9504)
"""Qwen2.5-VL-3B with a quarter of its widths, a ninth of its language layers, an eighth of its vision blocks and a
sixteenth of its vocabulary, which keeps the parts' shares of its parameters and of its arithmetic."""
TINY = Shape(64, 96, 2, 2, 32, 48, 2, 2, (1,), 1000)


@dataclass(frozen=True)
class Case:
    """One group and the policy that it is a step of."""

    shape: Shape
    images: int
    response: int
    """Tokens of a response, or of all responses on average."""
    rollouts: int = 6
    """Responses to each view: n."""
    copies: int = 1
    """Views beside the original: n_s."""
    side: int = 504
    """Of an image in pixels: 18 × 18 = 324 vision tokens."""
    ragged: bool = False
    """Responses are between a quarter of the mean and 7 quarters long."""

    @property
    def views(self) -> int:
        """Image orders in the group."""
        return self.copies + 1


def _case(images: int, response: int, **others: Any) -> Case:
    return Case(QUARTER_OF_3B, images, response, **others)


TARGET = "4 images, 256 tokens"
"""The case that the issue's goals are set for."""
CASES = {f"{images} images, {tokens} tokens": _case(images, tokens) for images in (2, 4) for tokens in (64, 256, 1024)}
CASES["4 images, 256 tokens, ragged"] = _case(4, 256, ragged=True)
SWEEP = {f"4 images, 256 tokens, n = {n}": _case(4, 256, rollouts=n) for n in (2, 4, 12)}
SWEEP |= {f"{images} images, 256 tokens": _case(images, 256) for images in (1, 8)}
QUICK = {"tiny": Case(TINY, 3, 5, rollouts=2, side=56, ragged=True)}
ALL_CASES = CASES | SWEEP | QUICK


def write_case(
    case: Case,
    folder: Path,
    *,
    questions: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> None:
    """A checkpoint with random weights, norms and biases random too, drawn on ``device`` (a CPU), and the images."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import make_tiny_policy as tool
    import transformers
    from PIL import Image

    shape = case.shape
    sizes = tool.TinyShape(
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        intermediate=shape.ffn,
        vision_hidden=shape.vision_hidden,
        vision_depth=shape.vision_depth,
        vision_heads=shape.vision_heads,
        vision_intermediate=shape.vision_ffn,
        rope_theta=1e6,
    )
    policy = folder / "policy"
    tool.make_tiny_policy(policy, tool.TinyShape())  # for its tokenizer and processors
    config = tool.make_config(sizes, transformers.AutoTokenizer.from_pretrained(policy))
    config.text_config.vocab_size = shape.vocabulary
    config.vision_config.fullatt_block_indexes = list(shape.full_attention_blocks)
    torch.manual_seed(0)
    with torch.device(device or "cpu"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(policy)
    random = np.random.default_rng(0)
    for number in range(case.images * questions):
        pixels = random.integers(0, 256, (case.side, case.side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def make_encoder(folder: Path) -> PromptEncoder:
    """The product's; TRL knows no tokens that the engine never samples, so here none are."""
    encoder = PromptEncoder(folder / "policy", system_prompt=SYSTEM_PROMPT)
    encoder.banned_token_ids = ()
    return encoder


def make_group(case: Case, folder: Path, encoder: PromptEncoder, question: int = 0) -> list[TrainingSequence]:
    """The sequences of a question with images of its own, view after view, the same in every process."""
    random = np.random.default_rng(1 + question)
    text = f"{IMAGE_PLACEHOLDER} " * case.images + QUESTION
    sequences = []
    for index in range(case.views):
        order = tuple(np.roll(np.arange(case.images), -index).tolist())
        images = tuple(folder / f"{question * case.images + old}.png" for old in order)
        prompt = encoder.encode(View(f"question {question}", index, order, images, text, "7", "index"))
        for _ in range(case.rollouts):
            quarter = case.response // 4
            length = int(random.integers(quarter, 7 * quarter + 1)) if case.ragged else case.response
            sequences.append(
                TrainingSequence(
                    prompt=prompt,
                    response=random.integers(0, 256, length),  # tokens of plain text
                    logprob_old=random.normal(-math.log(case.shape.vocabulary), 0.3, length).astype(np.float32),
                    advantage=float(np.float32(random.normal())),
                )
            )
    return sequences
