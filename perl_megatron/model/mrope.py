"""Positions for multimodal rotary embeddings (mRoPE): one (time, height, width) triple for each token."""

from __future__ import annotations

import numpy as np

from perl_megatron.types import EncodedPrompt


def position_ids(prompt: EncodedPrompt, response_length: int, merge_size: int = 2) -> np.ndarray:
    """Positions of a prompt and a response of ``response_length`` tokens after it: int64 [3, P + R].

    Text counts up by one in all three; the cells of an image take its start plus their (time, height, width) index;
    what follows starts one after the image's largest extent. Response tokens are text, whatever their ids.
    Equal to transformers' ``get_rope_index`` (for images).
    """
    total = len(prompt.token_ids) + response_length
    parts, token, position = [], 0, 0
    for start, (time, height, width) in zip(prompt.image_starts, prompt.grids.tolist(), strict=True):
        rows, columns = height // merge_size, width // merge_size
        parts.append(_text(start - token, position))
        position += start - token
        cells = np.indices((time, rows, columns), dtype=np.int64).reshape(3, -1)
        parts.append(cells + position)
        token = start + cells.shape[1]
        position += max(rows, columns)
    parts.append(_text(total - token, position))
    return np.concatenate(parts, axis=1)


def _text(length: int, position: int) -> np.ndarray:
    return np.broadcast_to(np.arange(position, position + length, dtype=np.int64), (3, length))
