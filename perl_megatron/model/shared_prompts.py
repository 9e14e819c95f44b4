"""Which tokens of a packed row attend to each other where all responses to a prompt share the one copy of it.

A row holds V prompts, one after the other, then the K responses to them, one after the other, then padding:

    prompt 0 | prompt 1 | … | response 0 to prompt 0 | response 1 to prompt 0 | … | padding

A prompt is causal; a response's token attends to its whole prompt and, causally, to its own response. That is two
attention calls over segments of varying length: prompts, and responses whose keys are the prompt's followed by their
own (a causal mask aligned at the bottom right). Nothing else of a layer depends on which token belongs to which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

MOST_PADDING = 1.25
"""Segments are put into one attention call as long as the longest is at most this many times the shortest, …"""
FREE_PADDING = 16
"""… or so many tokens longer: below that a call costs more than the padding."""


@dataclass(frozen=True)
class AttentionBlock:
    """One call for b segments of about the same length, padded on the right to Q queries and K keys."""

    queries: torch.Tensor
    """int64 [b, Q]: places in the row; padding repeats a place, and its result is not used."""
    keys: torch.Tensor
    """int64 [b, K]: places in the row; padding repeats a place that no real query attends to there."""
    mask: torch.Tensor | None
    """bool [b or 1, 1, Q, K]: the keys that each query attends to; None for the plain causal mask, where Q = K."""


@dataclass(frozen=True)
class SharedPrompts:
    """The segments of one packed row of N tokens. Travels through megatron-core as packed_seq_params.

    Built by ``share_prompts``. P tokens of prompts in all, R of responses.
    """

    prompt_lengths: np.ndarray
    """int64 [V], each at least 1."""
    response_lengths: np.ndarray
    """int64 [K], each at least 1."""
    prompt_of_response: np.ndarray
    """int64 [K]: which prompt each response answers."""
    row_length: int
    """N: P + R and the padding."""
    device: torch.device
    qkv_format: ClassVar[str] = "sbhd"
    """megatron-core's attention then applies the rotary angles to all N tokens at once, not segment by segment."""

    @property
    def num_prompt_tokens(self) -> int:
        """P."""
        return int(self.prompt_lengths.sum())

    @property
    def num_response_tokens(self) -> int:
        """R."""
        return int(self.response_lengths.sum())

    @property
    def num_padding(self) -> int:
        """Tokens at the end of the row that belong to nothing."""
        return self.row_length - self.num_prompt_tokens - self.num_response_tokens

    @cached_property
    def key_lengths(self) -> np.ndarray:
        """int64 [K]: keys of each response, its prompt's and its own."""
        return self.prompt_lengths[self.prompt_of_response] + self.response_lengths

    @cached_property
    def response_keys(self) -> torch.Tensor:
        """int64 [sum of ``key_lengths``]: places in the row of each response's keys, one response after the other."""
        segments = [keys for _, keys in self._response_places()]
        return torch.from_numpy(np.concatenate(segments)).to(self.device)

    # As variable-length attention takes lengths; computed once, because each copy to a GPU makes the host wait for it.

    @cached_property
    def prompt_ends(self) -> torch.Tensor:
        """int32 [V + 1]: 0, and where each prompt ends."""
        return self._cumulative(self.prompt_lengths)

    @cached_property
    def response_ends(self) -> torch.Tensor:
        """int32 [K + 1]: 0, and where each response ends, counted from the first response."""
        return self._cumulative(self.response_lengths)

    @cached_property
    def key_ends(self) -> torch.Tensor:
        """int32 [K + 1]: 0, and where the keys of each response end in ``response_keys``."""
        return self._cumulative(self.key_lengths)

    @cached_property
    def blocks(self) -> tuple[AttentionBlock, ...]:
        """All attention as calls on padded batches, for an attention that knows no segments."""
        starts = np.cumsum(self.prompt_lengths) - self.prompt_lengths
        prompts = [np.arange(length) + start for start, length in zip(starts, self.prompt_lengths, strict=True)]
        return tuple(
            self._block([segments[index] for index in group])
            for segments in ([(places, places) for places in prompts], list(self._response_places()))
            for group in _alike([(len(queries), len(keys)) for queries, keys in segments])
        )

    @cached_property
    def place_of_result(self) -> torch.Tensor:
        """int64 [P + R]: each token's place among the queries of all ``blocks``, one block after the other."""
        queries = np.concatenate([block.queries.cpu().numpy().ravel() for block in self.blocks])
        # Padding repeats a token's place after the token itself: the first one counts.
        tokens, first = np.unique(queries, return_index=True)
        assert len(tokens) == self.num_prompt_tokens + self.num_response_tokens
        return torch.from_numpy(first).to(self.device)

    def _cumulative(self, lengths: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(self.device)

    def _response_places(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each response: the places in the row of its tokens, and of its keys."""
        prompt_starts = np.cumsum(self.prompt_lengths) - self.prompt_lengths
        start = self.num_prompt_tokens
        for prompt, length in zip(self.prompt_of_response, self.response_lengths, strict=True):
            own = np.arange(start, start + length)
            yield own, np.concatenate([prompt_starts[prompt] + np.arange(self.prompt_lengths[prompt]), own])
            start += length

    def _block(self, segments: Sequence[tuple[np.ndarray, np.ndarray]]) -> AttentionBlock:
        queries, keys = zip(*segments, strict=True)
        num_keys = np.array([len(places) for places in keys])
        before = num_keys - [len(places) for places in queries]  # keys that come before a segment's first query
        padded_queries, padded_keys = _padded(queries), _padded(keys)
        mask = None
        if before.any():
            offsets = before[:1] if (before == before[0]).all() else before
            last = offsets[:, None] + np.arange(padded_queries.shape[1])
            allowed = np.arange(padded_keys.shape[1]) <= last[..., None]
            mask = torch.from_numpy(allowed[:, None]).to(self.device)
        return AttentionBlock(
            torch.from_numpy(padded_queries).to(self.device), torch.from_numpy(padded_keys).to(self.device), mask
        )


def share_prompts(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    *,
    row_length: int,
    device: torch.device,
) -> SharedPrompts:
    """The segments of V prompts and of the responses to each, ``response_lengths[prompt]``, as they lie in the row.

    A response without tokens has no place in the row, and is left out. ``row_length``: with padding.
    """
    owners = [(prompt, length) for prompt, own in enumerate(response_lengths) for length in own if length]
    lengths = np.array(owners, dtype=np.int64).reshape(-1, 2)
    segments = SharedPrompts(np.asarray(prompt_lengths, np.int64), lengths[:, 1], lengths[:, 0], row_length, device)
    assert segments.num_padding >= 0, (prompt_lengths, response_lengths, row_length)
    return segments


def _padded(places: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [segments, longest]: each padded on the right with its last place."""
    longest = max(len(own) for own in places)
    return np.stack([own[np.minimum(np.arange(longest), len(own) - 1)] for own in places])


def _alike(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Positions of segments in groups of about the same size (queries, keys), smallest first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index]):
        if groups and all(
            abs(size - least) <= max((MOST_PADDING - 1) * min(size, least), FREE_PADDING)
            for size, least in zip(sizes[index], sizes[groups[-1][0]], strict=True)
        ):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
