"""Prompts of text and two small images, as layouts see them."""

from __future__ import annotations

import numpy as np

from perl_megatron.types import EncodedPrompt

IMAGE_PAD, TEXT = 90, 7
SIZES = {"small": (1, 2, 2), "wide": (1, 2, 6)}
PIXELS = {
    key: np.full((t * h * w, 1176), index + 1, dtype=np.float32) for index, (key, (t, h, w)) in enumerate(SIZES.items())
}


def prompt(*keys: str) -> EncodedPrompt:
    tokens, starts = [TEXT], []
    for key in keys:
        starts.append(len(tokens))
        tokens += [IMAGE_PAD] * (int(np.prod(SIZES[key])) // 4) + [TEXT]
    return EncodedPrompt(
        token_ids=np.array(tokens),
        compact_ids=(),
        image_starts=tuple(starts),
        grids=np.array([SIZES[key] for key in keys], dtype=np.int64).reshape(-1, 3),
        image_keys=keys,
    )
