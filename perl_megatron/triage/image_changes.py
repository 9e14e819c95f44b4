"""Faults in what the vision tower is shown: images in other places, or the right ones with other numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from perl_megatron.data.patches import PATCH_VALUES
from perl_megatron.data.permutation import invert
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.triage.cases import Case, Change, ImageInput, ModelInput, with_images

ALL_ORDERS_UP_TO = 3
"""Of more images, pairs are swapped, the whole order is reversed, and the original order is restored; no others."""


def order_changes(max_images: int) -> Iterator[tuple[str, Change]]:
    """Images in other orders, and one shown in another's place; tokens and positions follow the images."""

    def original(case: Case) -> ModelInput | None:
        return _reordered(case, invert(case.rollout.order))

    yield "images in the record's original order", original
    yield "images in reversed order", lambda case: _reordered(case, range(len(case.plain.images))[::-1])
    if max_images > 1:
        yield "the first image in every place", lambda case: _reordered(case, [0] * len(case.plain.images))
    for first in range(max_images):
        for second in range(first + 1, max_images):
            yield f"images {first + 1} and {second + 1} swapped", _swap(first, second)
    for count in range(3, min(max_images, ALL_ORDERS_UP_TO) + 1):
        for order in permutations(range(count)):
            if all(new != old for new, old in enumerate(order)):  # else it is a swap or the right order
                yield f"images in the order {', '.join(str(old + 1) for old in order)}", _in_order(order)
    for new in range(max_images):
        for old in range(max_images):
            if new != old:
                yield f"image {old + 1} also in place of image {new + 1}", _replace(new, old)
    yield "features of the images scattered in the original order", _scattered


def _reordered(case: Case, order: Sequence[int]) -> ModelInput | None:
    images = case.plain.images
    if not images:
        return None
    pad = int(case.plain.prompt.token_ids[case.plain.prompt.image_starts[0]])
    return with_images(case.plain, [images[old] for old in order], pad)


def _in_order(order: Sequence[int]) -> Change:
    def change(case: Case) -> ModelInput | None:
        return _reordered(case, order) if len(order) == len(case.plain.images) else None

    return change


def _swap(first: int, second: int) -> Change:
    def change(case: Case) -> ModelInput | None:
        order = list(range(len(case.plain.images)))
        if second >= len(order):
            return None
        order[first], order[second] = second, first
        return _reordered(case, order)

    return change


def _replace(new: int, old: int) -> Change:
    def change(case: Case) -> ModelInput | None:
        order = list(range(len(case.plain.images)))
        if max(new, old) >= len(order):
            return None
        order[new] = old
        return _reordered(case, order)

    return change


def _scattered(case: Case) -> ModelInput | None:
    """Only where sizes differ: else it is the original order."""
    images = tuple(case.plain.images[old] for old in invert(case.rollout.order))
    if all(right.grid == wrong.grid for right, wrong in zip(case.plain.images, images, strict=True)):
        return None
    return replace(case.plain, images=images)


def pixel_changes(encoder: PromptEncoder) -> Iterator[tuple[str, Change]]:
    """The same images with other numbers."""
    mean, deviation = (np.repeat(values, PATCH_VALUES // 3).astype(np.float32) for values in encoder.normalization)

    def channels_reversed(patches: np.ndarray) -> np.ndarray:
        raw = (patches * deviation + mean).reshape(len(patches), 3, -1)[:, ::-1]
        return (raw.reshape(patches.shape) - mean) / deviation

    for name, numbers in (
        ("blank images (all numbers 0 after normalization)", np.zeros_like),
        ("black images", lambda patches: np.zeros_like(patches) - mean / deviation),
        ("pixels from 0 to 1 without mean and deviation", lambda patches: patches * deviation + mean),
        ("pixels from 0 to 255 without rescaling", lambda patches: 255 * (patches * deviation + mean)),
        ("normalized without rescaling", lambda patches: (255 * (patches * deviation + mean) - mean) / deviation),
        ("colour channels in the order blue, green, red", channels_reversed),
    ):
        yield name, _with_numbers(name, numbers)

    def as_text(case: Case) -> ModelInput | None:
        return replace(case.plain, images=()) if case.plain.images else None

    yield "no pixels: image tokens keep their own embedding", as_text


def _with_numbers(name: str, numbers: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(case: Case) -> ModelInput | None:
        if not case.plain.images:
            return None
        images = [
            ImageInput(f"{each.key}: {name}", np.ascontiguousarray(numbers(each.patches), np.float32), each.grid)
            for each in case.plain.images
        ]
        return replace(case.plain, images=tuple(images))

    return change
