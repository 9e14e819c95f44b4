"""The training sequences, and the micro-batches that they are laid out in.

Legend: B rows of a micro-batch, S padded tokens of a row, T response tokens that this rank predicts. Flat per-token
values run sequence by sequence, in the order of ``indices``; they line up with the hidden states that the model gives
for ``output_places``.

Two layouts: a row for each sequence (``train/grid.py``), or one row for all, where the responses to a prompt share it
(``train/packed.py``). With context parallelism, which only the first one has, a rank holds its part of each row, and S
and T count that part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from perl_megatron.model.policy import VisionInput
from perl_megatron.model.shared_prompts import SharedPrompts
from perl_megatron.types import EncodedPrompt


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
    """Places of the sequences in the global list; empty for a filler batch, which has one blank row."""
    token_ids: torch.Tensor
    """int64 [B, S]."""
    position_ids: torch.Tensor
    """int64 [3, B, S]."""
    vision: VisionInput | None
    """Only the images that occur in this rank's part; None without any, and for model chunks without vision tower."""
    output_places: torch.Tensor
    """int64 [max(T, 1)]: the positions that predict response tokens, counted row by row of [B, S]."""
    targets: torch.Tensor
    """int64 [max(T, 1)]: the predicted tokens. Without any, one token is predicted all the same, and ignored."""
    lengths: np.ndarray
    """int64 [len(indices)]: response tokens of each sequence, on all context ranks together."""
    own_tokens: np.ndarray
    """int64 [T]: which of the response tokens, counted from sequence to sequence, this rank predicts, ascending."""
    shared_prompts: SharedPrompts | None = None
    """How the tokens of the one row attend to each other; None where each row is a sequence."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.own_tokens)

    def places(self, starts: np.ndarray) -> np.ndarray:
        """int64 [T]: places of this rank's tokens, where the tokens of the i-th sequence of all begin at starts[i]."""
        if not self.indices:
            return self.own_tokens
        places = [starts[index] + np.arange(length) for index, length in zip(self.indices, self.lengths, strict=True)]
        return np.concatenate(places)[self.own_tokens]
