"""Sequences to micro-batches: right-padded token grids, each distinct image once, one flat row of response tokens.

Legend: B rows (sequences) of a micro-batch, S padded tokens of a row, T response tokens of the micro-batch, U distinct
images, M image-pad tokens. Rows are in the order of ``indices``; flat per-token values run row by row, so they line up
with the hidden states that the model gives for ``output_mask``.

With context parallelism a rank holds its part of each row, and S and T count that part.

The rollouts of one group stay together, so that their images pass through the vision tower once for the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from perl_megatron.config.layout import num_micro_batches
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.model.context_parallel import context_part
from perl_megatron.model.mrope import position_ids
from perl_megatron.model.policy import VisionInput
from perl_megatron.types import EncodedPrompt

MERGED_CELLS = 4
"""14-pixel patches that make one image-pad token (the merger's 2×2)."""


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt and one response to it. R response tokens."""

    prompt: EncodedPrompt
    response: np.ndarray
    """int64 [R]."""
    logprob_old: np.ndarray | None = None
    """float32 [R]: log-probabilities under the policy that the ratio is taken against (π_old)."""
    logprob_ref: np.ndarray | None = None
    """float32 [R]: log-probabilities under the reference policy (π_ref)."""
    advantage: float = 0.0
    importance: np.ndarray | None = None
    """float64 [R]: constant weights of the policy loss (``algorithm/importance.py``)."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt.token_ids) + len(self.response)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, and what its loss needs."""

    indices: tuple[int, ...]
    """Positions of the rows in the global list of sequences; empty for a filler batch, which has one blank row."""
    token_ids: torch.Tensor
    """int64 [B, S]."""
    position_ids: torch.Tensor
    """int64 [3, B, S]."""
    vision: VisionInput | None
    """Only the images that occur in this rank's part; None without any, and for model chunks without vision tower."""
    output_mask: torch.Tensor
    """bool [B, S]: the positions that predict response tokens."""
    targets: torch.Tensor
    """int64 [max(T, 1)]: the predicted tokens. Without any, one token is predicted all the same, and ignored."""
    lengths: np.ndarray
    """int64 [len(indices)]: response tokens of each row, on all context ranks together."""
    own_tokens: np.ndarray
    """int64 [T]: which of the rows' response tokens, counted from row to row, this rank predicts, ascending."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.own_tokens)

    def places(self, starts: np.ndarray) -> np.ndarray:
        """int64 [T]: places of this rank's tokens, where the tokens of the i-th sequence of all begin at starts[i]."""
        if not self.indices:
            return self.own_tokens
        rows = [starts[index] + np.arange(length) for index, length in zip(self.indices, self.lengths, strict=True)]
        return np.concatenate(rows)[self.own_tokens]


def split_sequences(
    prompt_lengths: Sequence[int], micro_batch_size: int, data_size: int, parallel: ParallelConfig | None = None
) -> list[list[tuple[int, ...]]]:
    """Which sequences are in which micro-batch: ``result[data_rank][micro_batch]`` holds their positions.

    Shares are contiguous and as even as possible. Every data-parallel rank has the same number of micro-batches (some
    empty where there are fewer sequences than that), as the collectives of a step and ``parallel`` need. Within
    a rank's share, sequences are taken by the length of their prompt, which saves padding and leaves a group together:
    its views have prompts of the same length.
    """
    shares = np.array_split(np.arange(len(prompt_lengths)), data_size)
    number = num_micro_batches(len(shares[0]), micro_batch_size, parallel or ParallelConfig())
    lengths = np.asarray(prompt_lengths, dtype=np.int64)
    ordered = [share[np.argsort(lengths[share], kind="stable")] for share in shares]
    return [[tuple(part.tolist()) for part in np.array_split(share, number)] for share in ordered]


def collate(
    sequences: Sequence[TrainingSequence],
    indices: Sequence[int],
    *,
    length_multiple: int,
    pad_token_id: int,
    patches: Callable[[str], np.ndarray] | None,
    device: torch.device,
    context: tuple[int, int] = (0, 1),
) -> MicroBatch:
    """Lay out ``sequences[i] for i in indices``, one in each row, padded to a multiple of ``length_multiple``.

    ``patches`` gives an image's float32 [t·h·w, 1176] by its content key; None leaves the images out (later pipeline
    stages). ``context``: this context rank and their number. A causal model lets no token see the padding on its right.
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
    return MicroBatch(
        indices=tuple(indices),
        token_ids=torch.from_numpy(token_ids[:, part]).to(device),
        position_ids=torch.from_numpy(positions[:, :, part]).to(device),
        vision=None if patches is None else _vision_input(rows, part, length, patches, device),
        output_mask=torch.from_numpy(own_mask).to(device),
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


def _vision_input(
    rows: Sequence[TrainingSequence],
    part: np.ndarray,
    length: int,
    patches: Callable[[str], np.ndarray],
    device: torch.device,
) -> VisionInput | None:
    """Each distinct image of this rank's ``part`` of the rows once, and for every image-pad token its feature."""
    grids: dict[str, np.ndarray] = {}
    first_feature: dict[str, int] = {}
    num_features = 0
    own_place = np.full(length, -1)
    own_place[part] = np.arange(len(part))
    image_mask = np.zeros((max(1, len(rows)), len(part)), dtype=bool)
    feature_index: list[np.ndarray] = []
    for row, sequence in enumerate(rows):
        prompt = sequence.prompt
        for key, grid, start in zip(prompt.image_keys, prompt.grids, prompt.image_starts, strict=True):
            num_tokens = int(grid.prod()) // MERGED_CELLS
            places = own_place[start : start + num_tokens]
            cells = np.flatnonzero(places >= 0)
            if not len(cells):
                continue
            if key not in first_feature:
                grids[key], first_feature[key] = grid, num_features
                num_features += num_tokens
            image_mask[row, places[cells]] = True
            feature_index.append(first_feature[key] + cells)
    if not grids:
        return None
    return VisionInput(
        patches=torch.from_numpy(np.concatenate([patches(key) for key in grids])).to(device),
        grids=torch.from_numpy(np.stack(list(grids.values()))).to(device),
        feature_index=torch.from_numpy(np.concatenate(feature_index)).to(device),
        image_mask=torch.from_numpy(image_mask).to(device),
    )
