"""The images of a micro-batch: which the vision tower encodes, and where their features go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from perl_megatron.model.policy import VisionInput
from perl_megatron.types import EncodedPrompt

PATCHES_PER_CELL = 4
"""14-pixel patches that make one image-pad token (the merger's 2×2)."""


@dataclass(frozen=True)
class ImageOccurrence:
    """An image at one place of a prompt that a micro-batch holds."""

    key: str
    """The content hash of its pixels."""
    grid: np.ndarray
    """int64 [3]: (time, height, width) in patches."""
    places: np.ndarray
    """int64 [t·h·w / 4]: where its image-pad tokens are, counted row by row of [B, S]; -1: on another context rank."""


def prompt_images(prompt: EncodedPrompt, places: np.ndarray) -> Iterable[ImageOccurrence]:
    """The images of a prompt whose tokens are at ``places`` int64 [P or more]."""
    for key, grid, start in zip(prompt.image_keys, prompt.grids, prompt.image_starts, strict=True):
        yield ImageOccurrence(key, grid, places[start : start + int(grid.prod()) // PATCHES_PER_CELL])


def vision_input(
    occurrences: Iterable[ImageOccurrence],
    patches: Callable[[str], np.ndarray],
    device: torch.device,
    *,
    share: bool,
) -> VisionInput | None:
    """The input of the vision tower; None where no image has a token here.

    With ``share`` each distinct image is encoded once, and its features go to all places where it occurs; else each
    occurrence is encoded. Images of one size lie next to each other: the tower attends to all of them in one call.
    ``patches`` gives an image's float32 [t·h·w, 1176] by its key.
    """
    present = [occurrence for occurrence in occurrences if (occurrence.places >= 0).any()]
    if not present:
        return None
    firsts: dict[object, ImageOccurrence] = {}
    owners = [occurrence.key if share else number for number, occurrence in enumerate(present)]
    for owner, occurrence in zip(owners, present, strict=True):
        firsts.setdefault(owner, occurrence)
    encoded = sorted(firsts, key=lambda owner: tuple(firsts[owner].grid.tolist()))  # stable: first come, first served
    first_feature = dict(zip(encoded, _starts([len(firsts[owner].places) for owner in encoded]), strict=True))
    places, features = [], []
    for owner, occurrence in zip(owners, present, strict=True):
        cells = np.flatnonzero(occurrence.places >= 0)
        places.append(occurrence.places[cells])
        features.append(first_feature[owner] + cells)
    return VisionInput(
        patches=torch.from_numpy(np.concatenate([patches(firsts[owner].key) for owner in encoded])).to(device),
        grids=torch.from_numpy(np.stack([firsts[owner].grid for owner in encoded])).to(device),
        feature_index=torch.from_numpy(np.concatenate(features)).to(device),
        image_places=torch.from_numpy(np.concatenate(places)).to(device),
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths)[:-1].tolist()]
