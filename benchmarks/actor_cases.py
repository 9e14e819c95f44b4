"""The models and batches of the actor's benchmark, the same for both sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perl_megatron.train.batch import TrainingSequence
from perl_megatron.types import EncodedPrompt

IMAGE_TOKEN, VISION_START, VISION_END = 7, 5, 6
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Case:
    """Sizes of the model and of one batch of ``MICRO_BATCHES``."""

    text: dict[str, Any]
    vision: dict[str, Any]
    rows: int
    images: int
    """In each row."""
    side: int
    """Of an image, in patches of 14 pixels."""
    prompt_words: int
    """Text tokens of a prompt beside its images."""
    response: int
    repeats: int


def _text(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    half = hidden // heads // 2
    section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    }


def _vision(depth: int, hidden: int, ffn: int, heads: int, out: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_heads": heads,
        "out_hidden_size": out,
        "window_size": 112,
        "fullatt_block_indexes": [depth - 1],
    }


CASES = {
    # The demo's policy, on images of a few merged tokens.
    "tiny": Case(_text(4, 128, 224, 4, 2, 704), _vision(4, 64, 144, 4, 128), 8, 2, 8, 40, 24, 10),
    # Layers of the 3B model, two of the language model's and four of the tower's (one with full attention); fewer rows
    # in the vocabulary, whose logits are the fused loss kernels' subject.
    "3B layers": Case(_text(2, 2048, 11008, 16, 2, 16384), _vision(4, 1280, 3420, 16, 2048), 2, 2, 16, 64, 64, 3),
}


def write_case(case: Case, folder: Path) -> None:
    """A checkpoint with random weights: float32, norms and biases random too."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=case.text,
        vision_config=case.vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=8,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Inputs:
    """Rows of one length, nothing padded. Stands for the encoder, of which the schedule asks pixels and padding."""

    sequences: list[TrainingSequence]
    all_patches: dict[str, np.ndarray]
    pad_token_id: int = 0

    def patches(self, key: str) -> np.ndarray:
        """float32 [N, 1176] of one image."""
        return self.all_patches[key]


def make_inputs(case: Case) -> Inputs:
    """The case's batch, the same in every process."""
    random = np.random.default_rng(1)
    cells = case.side**2 // 4
    sequences, patches = [], {}
    for row in range(case.rows):
        tokens, starts, keys = list(random.integers(10, 700, case.prompt_words)), [], []
        for image in range(case.images):
            keys.append(f"{row}-{image}")
            patches[keys[-1]] = random.standard_normal((case.side**2, 1176), dtype=np.float32)
            tokens.append(VISION_START)
            starts.append(len(tokens))
            tokens += [IMAGE_TOKEN] * cells + [VISION_END]
        prompt = EncodedPrompt(
            token_ids=np.array(tokens, dtype=np.int64),
            compact_ids=(),
            image_starts=tuple(starts),
            grids=np.array([[1, case.side, case.side]] * case.images),
            image_keys=tuple(keys),
        )
        sequences.append(TrainingSequence(prompt=prompt, response=random.integers(10, 700, case.response)))
    return Inputs(sequences, patches)
