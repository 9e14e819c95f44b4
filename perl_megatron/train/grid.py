"""The naive layout, and the reference of the other: one row for each sequence, padded on the right.

A prompt is run again for each of its responses. See ``train/batch.py`` for the legend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from perl_megatron.model.context_parallel import context_part
from perl_megatron.model.mrope import position_ids
from perl_megatron.train.batch import MicroBatch, TrainingSequence
from perl_megatron.train.vision_input import prompt_images, vision_input
from perl_megatron.types import EncodedPrompt


def lay_out_rows(
    sequences: Sequence[TrainingSequence],
    indices: Sequence[int],
    *,
    length_multiple: int,
    pad_token_id: int,
    patches: Callable[[str], np.ndarray] | None,
    device: torch.device,
    share_images: bool = True,
    context: tuple[int, int] = (0, 1),
) -> MicroBatch:
    """Lay out ``sequences[i] for i in indices``, one in each row, padded to a multiple of ``length_multiple``.

    ``patches`` gives an image's float32 [t·h·w, 1176] by its content key; None leaves the images out (later pipeline
    stages). ``share_images``: each distinct image is encoded once. ``context``: this context rank and their number. A
    causal model lets no token see the padding on its right.
    """
    rows = [sequences[index] for index in indices]
    num_rows = max(1, len(rows))
    longest = max((sequence.length for sequence in rows), default=1)
    length = -(-longest // length_multiple) * length_multiple
    token_ids = np.full((num_rows, length), pad_token_id, dtype=np.int64)
    positions = np.zeros((3, num_rows, length), dtype=np.int64)
    output_mask = np.zeros((num_rows, length), dtype=bool)
    prompt_positions = _positions_by_prompt(rows)
    for row, sequence in enumerate(rows):
        num_prompt, total = len(sequence.prompt.token_ids), sequence.length
        token_ids[row, :num_prompt] = sequence.prompt.token_ids
        token_ids[row, num_prompt:total] = sequence.response
        positions[:, row, :total] = prompt_positions[id(sequence.prompt)][:, :total]
        output_mask[row, num_prompt - 1 : total - 1] = True
    part = context_part(length, *context)
    number = np.cumsum(output_mask).reshape(output_mask.shape) - 1
    own_mask = output_mask[:, part]
    own_tokens = number[:, part][own_mask]
    targets = np.roll(token_ids, -1, axis=1)[:, part][own_mask]
    if not len(own_tokens):
        own_mask[0, 0] = True
        targets = np.array([pad_token_id])
    own_places = np.full((num_rows, length), -1)
    own_places[:, part] = np.arange(num_rows * len(part)).reshape(num_rows, -1)
    images = [image for row, one in enumerate(rows) for image in prompt_images(one.prompt, own_places[row])]
    return MicroBatch(
        indices=tuple(indices),
        token_ids=torch.from_numpy(token_ids[:, part]).to(device),
        position_ids=torch.from_numpy(positions[:, :, part]).to(device),
        vision=None if patches is None else vision_input(images, patches, device, share=share_images),
        output_places=torch.from_numpy(np.flatnonzero(own_mask)).to(device),
        targets=torch.from_numpy(targets).to(device),
        lengths=np.array([len(sequence.response) for sequence in rows], dtype=np.int64),
        own_tokens=own_tokens,
    )


def _positions_by_prompt(rows: Sequence[TrainingSequence]) -> dict[int, np.ndarray]:
    """mRoPE positions of each distinct prompt with its longest response; a shorter response's are a prefix of them."""
    longest: dict[int, tuple[EncodedPrompt, int]] = {}
    for sequence in rows:
        key, num_response = id(sequence.prompt), len(sequence.response)
        if key not in longest or longest[key][1] < num_response:
            longest[key] = (sequence.prompt, num_response)
    return {key: position_ids(prompt, num_response) for key, (prompt, num_response) in longest.items()}
