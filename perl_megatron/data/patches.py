"""Pixels to what the vision tower reads: normalised patches, as the checkpoint's own image processor makes them.

Of an image that is not resized, each number of the processor's result depends on one colour value alone. So what it
makes of all 256 values of each channel is asked once, and read from a table from then on: bit for bit the processor's
numbers, whichever of transformers' implementations it is, in two fifths of its time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

PATCH_SIZE = 14
TEMPORAL_SIZE = 2
"""Frames of a patch; an image is shown as that many equal ones."""
PATCH_VALUES = 3 * TEMPORAL_SIZE * PATCH_SIZE * PATCH_SIZE
MERGE_SIZE = 2
"""Patches on a side of a block that the tower merges into one token."""
BLOCK_SIZE = MERGE_SIZE * PATCH_SIZE

Processor = Callable[[np.ndarray], np.ndarray]
"""Pixels uint8 [height, width, 3] to float32 [N, 1176]."""


class Patches:
    """An image processor's patches without the processor.

    Args:
        process: the processor, which must not resize; called here and not later. Raises ValueError where it does
            anything to pixels that is not a change of each value by itself.
    """

    def __init__(self, process: Processor):
        # One merge block has 784 places for the 256 values.
        ramp = np.repeat(np.arange(BLOCK_SIZE**2).astype(np.uint8).reshape(BLOCK_SIZE, BLOCK_SIZE, 1), 3, axis=2)
        values, answer = _by_patch(ramp), _answer(process, ramp)
        self._table = np.zeros((3, 256), np.float32)
        for channel in range(3):
            self._table[channel, values[:, channel]] = answer[:, channel, 0]
        sides = (3 * BLOCK_SIZE, 2 * BLOCK_SIZE)
        picture = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
        if not np.array_equal(_answer(process, picture).reshape(-1, PATCH_VALUES), self(picture)):
            raise ValueError("the image processor does not change each colour value by itself")

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [N, 1176] of uint8 [height, width, 3]; both sides are multiples of 28. In 2 × 2 merge blocks."""
        by_patch = _by_patch(pixels)
        patches = np.empty((len(by_patch), 3, TEMPORAL_SIZE, PATCH_SIZE**2), np.float32)
        for channel in range(3):
            patches[:, channel] = np.take(self._table[channel], by_patch[:, channel])[:, None]
        return patches.reshape(-1, PATCH_VALUES)


def _by_patch(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, 3, 196] of uint8 [height, width, 3]: block by block, in each patch by patch, row by row."""
    height, width, _ = pixels.shape
    blocks = (height // BLOCK_SIZE, MERGE_SIZE, PATCH_SIZE, width // BLOCK_SIZE, MERGE_SIZE, PATCH_SIZE, 3)
    in_order = pixels.reshape(blocks).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(in_order).reshape(-1, 3, PATCH_SIZE**2)


def _answer(process: Processor, pixels: np.ndarray) -> np.ndarray:
    """What the processor says, float32 [N, 3, 2, 196]."""
    answer = process(pixels)
    num_patches = pixels.shape[0] * pixels.shape[1] // PATCH_SIZE**2
    if answer.shape != (num_patches, PATCH_VALUES):
        raise ValueError(f"the image processor makes {answer.shape} numbers, not {(num_patches, PATCH_VALUES)}")
    return answer.reshape(num_patches, 3, TEMPORAL_SIZE, PATCH_SIZE**2)
