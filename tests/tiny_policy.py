"""A tiny Qwen2.5-VL whose dimensions differ pairwise, a batch of multi-image sequences, and transformers' answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from perl_megatron.model.mrope import position_ids
from perl_megatron.model.policy import VisionInput
from perl_megatron.types import EncodedPrompt

IMAGE_TOKEN, VISION_START, VISION_END = 300, 301, 302
VOCABULARY = 331  # odd: tensor parallelism has to fill it up
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "depth": 3,
    "hidden_size": 80,
    "intermediate_size": 120,
    "num_heads": 4,
    "window_size": 56,
    "out_hidden_size": 96,
    "fullatt_block_indexes": [1],
}


def hf_config(*, tied: bool):
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IMAGE_TOKEN,
        video_token_id=303,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )


def hf_model(*, tied: bool, seed: int = 0):
    """float32, every parameter random (norms and biases too) and large enough that logits differ by several nats."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(hf_config(tied=tied))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name or "ln_q" in name else 0.0))
            else:
                parameter.copy_(noise * (1.5 if "embed_tokens" in name else 1.0) * parameter[0].numel() ** -0.5)
    return model


@dataclass
class Sequence:
    """A prompt over some of the batch's images, and a response."""

    prompt: EncodedPrompt
    images: tuple[int, ...]
    response: np.ndarray
    weights: torch.Tensor
    """float64 [R]: the weight of each response token's log-probability in the loss."""


@dataclass
class Batch:
    grids: np.ndarray
    patches: list[torch.Tensor]
    sequences: list[Sequence]


def make_batch(seed: int = 0) -> Batch:
    """Five images of four sizes; sequences share them, in several orders, one holds an image twice, one holds none."""
    random = np.random.default_rng(seed)
    grids = np.array([[1, 4, 6], [1, 10, 8], [1, 2, 2], [1, 2, 2], [1, 6, 4]])
    patches = [torch.from_numpy(random.standard_normal((t * h * w, 1176), dtype=np.float32)) for t, h, w in grids]
    orders = [(0, 1), (1, 0), (2, 3, 4), (4, 2, 2, 3), (), (3,)]
    return Batch(grids, patches, [_make_sequence(order, grids, random) for order in orders])


def _make_sequence(images: tuple[int, ...], grids: np.ndarray, random: np.random.Generator) -> Sequence:
    tokens, starts = list(random.integers(3, 290, 4)), []
    for image in images:
        tokens.append(VISION_START)
        starts.append(len(tokens))
        tokens += [IMAGE_TOKEN] * int(np.prod(grids[image]) // 4) + [VISION_END]
        tokens += list(random.integers(3, 290, random.integers(0, 4)))
    tokens += list(random.integers(3, 290, 3))
    prompt = EncodedPrompt(
        token_ids=np.array(tokens, dtype=np.int64),
        compact_ids=(),
        image_starts=tuple(starts),
        grids=grids[list(images)].reshape(-1, 3),
        image_keys=tuple(str(image) for image in images),
    )
    response = random.integers(3, 290, random.integers(3, 9))
    return Sequence(prompt, images, response, torch.from_numpy(random.standard_normal(len(response))))


@dataclass
class PolicyInput:
    token_ids: torch.Tensor
    position_ids: torch.Tensor
    vision: VisionInput | None
    output_mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def policy_input(batch: Batch, members: list[int], *, multiple: int = 1, length: int | None = None) -> PolicyInput:
    """One micro-batch of these sequences, padded on the right; each image that occurs is given once."""
    sequences = [batch.sequences[member] for member in members]
    lengths = [len(sequence.prompt.token_ids) + len(sequence.response) for sequence in sequences]
    width = length or -(-max(lengths) // multiple) * multiple
    used = sorted({image for sequence in sequences for image in sequence.images})
    cells = {image: int(np.prod(batch.grids[image]) // 4) for image in used}
    first = dict(zip(used, np.cumsum([0, *cells.values()])[:-1].tolist(), strict=True))
    tokens = torch.zeros(len(members), width, dtype=torch.long)
    positions = torch.zeros(3, len(members), width, dtype=torch.long)
    image_mask, output_mask = (torch.zeros(len(members), width, dtype=torch.bool) for _ in range(2))
    index = []
    for row, (sequence, total) in enumerate(zip(sequences, lengths, strict=True)):
        tokens[row, :total] = torch.from_numpy(np.concatenate([sequence.prompt.token_ids, sequence.response]))
        positions[:, row, :total] = torch.from_numpy(position_ids(sequence.prompt, len(sequence.response)))
        output_mask[row, total - len(sequence.response) - 1 : total - 1] = True
        for image, start in zip(sequence.images, sequence.prompt.image_starts, strict=True):
            image_mask[row, start : start + cells[image]] = True
            index.append(torch.arange(first[image], first[image] + cells[image]))
    vision = None
    if used:
        patches = torch.cat([batch.patches[image] for image in used])
        vision = VisionInput(patches, torch.from_numpy(batch.grids[used]), torch.cat(index), image_mask)
    return PolicyInput(
        tokens,
        positions,
        vision,
        output_mask,
        targets=torch.from_numpy(np.concatenate([sequence.response for sequence in sequences])),
        weights=torch.cat([sequence.weights for sequence in sequences]),
    )


def reference_log_probs(model, batch: Batch, members: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """transformers, one sequence at a time, without padding, its own positions."""
    results = []
    for sequence in (batch.sequences[member] for member in members):
        ids = torch.from_numpy(np.concatenate([sequence.prompt.token_ids, sequence.response]))[None]
        images = {}
        if sequence.images:
            images = {
                "pixel_values": torch.cat([batch.patches[image] for image in sequence.images]).to(dtype),
                "image_grid_thw": torch.from_numpy(sequence.prompt.grids),
            }
        types = (ids == IMAGE_TOKEN).int()
        logits = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, **images).logits[0]
        log_probs = logits.log_softmax(-1)
        count = len(sequence.response)
        results.append(log_probs[-count - 1 : -1].gather(-1, ids[0, -count:, None])[:, 0])
    return results


@dataclass
class Reference:
    log_probs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    """By published name."""


def reference(folder: Path, batch: Batch, dtype: torch.dtype) -> Reference:
    """Log-probabilities of all sequences and gradients of the weighted sum, by transformers in this dtype."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from perl_megatron.checkpoint.qwen25_vl_table import published_name

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    members = list(range(len(batch.sequences)))
    log_probs = reference_log_probs(model, batch, members, dtype)
    loss = sum((own * batch.sequences[i].weights.to(dtype)).sum() for i, own in enumerate(log_probs))
    loss.backward()
    gradients = {published_name(name): parameter.grad for name, parameter in model.named_parameters()}
    return Reference([own.detach() for own in log_probs], gradients)
