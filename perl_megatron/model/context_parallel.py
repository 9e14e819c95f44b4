"""How sequences are cut over context-parallel ranks."""

from __future__ import annotations

import numpy as np


def context_part(length: int, rank: int, size: int) -> np.ndarray:
    """int64 [length / size]: the positions of a sequence that context rank ``rank`` of ``size`` holds.

    The sequence is cut into 2 · size parts, and a rank takes part ``rank`` and its mirror image from the end: so causal
    attention is the same work for all (the order that megatron-core and TransformerEngine expect).
    """
    if size == 1:
        return np.arange(length)
    assert length % (2 * size) == 0, (length, size)
    parts = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([parts[rank], parts[2 * size - 1 - rank]])
