"""The layout that shares prompts: one row for a micro-batch, each prompt once, then all responses (``SharedPrompts``).

The last token of a prompt predicts the first token of every response to it, so its hidden state is an output as many
times. The last token of a response predicts nothing, and is not in the row. mRoPE positions of every response go on
from its prompt. See ``train/batch.py`` for the legend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from perl_megatron.batching.work import views_of
from perl_megatron.model.mrope import position_ids
from perl_megatron.model.shared_prompts import share_prompts
from perl_megatron.train.batch import MicroBatch, TrainingSequence
from perl_megatron.train.vision_input import ImageOccurrence, prompt_images, vision_input


def lay_out_packed(
    sequences: Sequence[TrainingSequence],
    indices: Sequence[int],
    *,
    length_multiple: int,
    pad_token_id: int,
    patches: Callable[[str], np.ndarray] | None,
    device: torch.device,
) -> MicroBatch:
    """Lay out ``sequences[i] for i in indices`` in one row, padded to a multiple of ``length_multiple``.

    Sequences with equal prompts over equal images share them, and each image is encoded once. ``patches``: as in
    ``lay_out_rows``.
    """
    chosen = [sequences[index] for index in indices]
    row = _Row(chosen, _members(chosen), length_multiple, pad_token_id)
    lengths = np.array([len(sequence.response) for sequence in chosen], dtype=np.int64)
    # Without any response token, one is predicted all the same, and ignored.
    outputs = np.concatenate(row.outputs) if lengths.sum() else np.zeros(1, dtype=np.int64)
    targets = np.concatenate([sequence.response for sequence in chosen]) if lengths.sum() else np.array([pad_token_id])
    return MicroBatch(
        indices=tuple(indices),
        token_ids=torch.from_numpy(row.token_ids[None]).to(device),
        position_ids=torch.from_numpy(row.positions[:, None]).to(device),
        vision=None if patches is None else vision_input(row.images, patches, device, share=True),
        output_places=torch.from_numpy(outputs).to(device),
        targets=torch.from_numpy(targets).to(device),
        lengths=lengths,
        own_tokens=np.arange(lengths.sum()),
        shared_prompts=share_prompts(
            row.prompt_lengths, row.response_lengths, row_length=len(row.token_ids), device=device
        ),
    )


def _members(chosen: Sequence[TrainingSequence]) -> list[tuple[int, ...]]:
    """The positions of the sequences of each prompt."""
    views = views_of([sequence.prompt for sequence in chosen], [len(sequence.response) for sequence in chosen])
    return [view.sequence_indices for view in views]


class _Row:
    """The packed row of ``chosen`` sequences; ``members`` are those of each prompt, and none have no prompt."""

    def __init__(
        self, chosen: Sequence[TrainingSequence], members: Sequence[Sequence[int]], multiple: int, pad_token_id: int
    ):
        prompts = [chosen[own[0]].prompt for own in members]
        self.prompt_lengths = [len(prompt.token_ids) for prompt in prompts] or [1]  # a filler batch: one blank token
        lengths = [max(0, len(sequence.response) - 1) for sequence in chosen]
        self.response_lengths = [[lengths[number] for number in own] for own in members] or [[]]
        num_tokens = sum(self.prompt_lengths) + sum(map(sum, self.response_lengths))
        length = -(-num_tokens // multiple) * multiple
        self.token_ids = np.full(length, pad_token_id, dtype=np.int64)
        self.positions = np.zeros((3, length), dtype=np.int64)
        self.images: list[ImageOccurrence] = []
        self.outputs: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(chosen)
        """For each sequence, the positions that predict its response."""
        start, response_start = 0, sum(self.prompt_lengths)
        for prompt, own in zip(prompts, members, strict=True):
            end = start + len(prompt.token_ids)
            self.token_ids[start:end] = prompt.token_ids
            positions = position_ids(prompt, max(lengths[number] for number in own))
            self.positions[:, start:end] = positions[:, : end - start]
            self.images += prompt_images(prompt, np.arange(start, end))
            for number in own:
                num_response = lengths[number]
                places = response_start + np.arange(num_response)
                response = chosen[number].response
                self.token_ids[places] = response[:num_response]
                self.positions[:, places] = positions[:, end - start : end - start + num_response]
                self.outputs[number] = np.concatenate([[end - 1], places])[: len(response)]
                response_start += num_response
            start = end
