"""What may have gone wrong with the input: token ids, pixels, mRoPE positions. Each is an input of its own.

A hypothesis gives None for a rollout whose input it does not change: without images, say, or with equal ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from perl_megatron.data.permutation import invert
from perl_megatron.data.processor import PATCH_VALUES, PromptEncoder
from perl_megatron.model.mrope import position_ids
from perl_megatron.triage.cases import Case, ImageInput, ModelInput, collapse
from perl_megatron.triage.policies import Mix
from perl_megatron.triage.verdicts import Cause
from perl_megatron.types import EncodedPrompt

ALL_ORDERS_UP_TO = 3
"""With more images, only pairs are swapped and the whole order is reversed."""

Change = Callable[[Case], ModelInput | None]


@dataclass(frozen=True)
class Hypothesis:
    """One thing that may have gone wrong."""

    cause: Cause | None
    name: str
    change: Change | None = None
    """What becomes of the right input; None: it stays."""
    mix: Mix | None = None
    """The weights; None: those that were expected."""


RIGHT = Hypothesis(None, "nothing is wrong")


def input_hypotheses(encoder: PromptEncoder, max_images: int) -> list[Hypothesis]:
    """All wrong inputs, for rollouts of at most ``max_images`` images."""
    return [
        *(Hypothesis(Cause.TOKEN_IDS, name, change) for name, change in _token_changes(encoder)),
        *(Hypothesis(Cause.PIXELS, name, change) for name, change in _order_changes(max_images)),
        *(Hypothesis(Cause.PIXELS, name, change) for name, change in _pixel_changes(encoder)),
        *(Hypothesis(Cause.POSITIONS, name, change) for name, change in _position_changes()),
    ]


def with_images(plain: ModelInput, images: Sequence[ImageInput], image_token_id: int) -> ModelInput | None:
    """The prompt over other images (as many), their tokens and positions following; None where they are the same."""
    if [each.key for each in images] == [each.key for each in plain.images]:
        return None
    prompt = expand(plain.prompt.compact_ids, images, image_token_id)
    return replace(plain, prompt=prompt, images=tuple(images))


def expand(compact: Sequence[int], images: Sequence[ImageInput], image_token_id: int) -> EncodedPrompt:
    """Each image token as many times as its image has merged patches."""
    ids: list[int] = []
    starts: list[int] = []
    for token in compact:
        if token == image_token_id:
            starts.append(len(ids))
            ids += [token] * images[len(starts) - 1].num_tokens
        else:
            ids.append(token)
    grids = np.array([each.grid for each in images], dtype=np.int64).reshape(-1, 3)
    return EncodedPrompt(np.array(ids), tuple(compact), tuple(starts), grids, tuple(each.key for each in images))


def _token_changes(encoder: PromptEncoder) -> Iterator[tuple[str, Change]]:
    pad = encoder.image_token_id

    def without_system(case: Case) -> ModelInput | None:
        compact = case.plain.prompt.compact_ids
        if compact.count(encoder.turn_end_id) < 2:
            return None  # the only turn is the user's
        end = compact.index(encoder.turn_end_id) + 1
        newline = tuple(encoder.tokenizer("\n", add_special_tokens=False).input_ids)
        end += len(newline) if compact[end : end + len(newline)] == newline else 0
        return replace(case.plain, prompt=expand(compact[end:], case.plain.images, pad))

    def cut(start: int, end: int | None) -> Change:
        def change(case: Case) -> ModelInput | None:
            compact = case.plain.prompt.compact_ids[start:end]
            return replace(case.plain, prompt=expand(compact, case.plain.images, pad))

        return change

    def unexpanded(case: Case) -> ModelInput | None:
        plain = case.plain
        prompt = expand(plain.prompt.compact_ids, plain.images, pad)
        bare = EncodedPrompt(np.array(prompt.compact_ids), prompt.compact_ids, (), np.zeros((0, 3), np.int64), ())
        return replace(plain, prompt=bare, images=()) if plain.images else None

    def expanded_twice(case: Case) -> ModelInput | None:
        plain = case.plain
        prompt = plain.prompt
        if not plain.images:
            return None
        ids: list[int] = []
        starts: list[int] = []
        for token, is_start in zip(prompt.token_ids.tolist(), _flags(prompt), strict=True):
            if is_start:
                starts.append(len(ids))
                ids += [pad] * plain.images[len(starts) - 1].num_tokens
            ids.append(token)
        twice = EncodedPrompt(
            np.array(ids), collapse(np.array(ids), pad), tuple(starts), prompt.grids, prompt.image_keys
        )
        return replace(plain, prompt=twice)

    yield "without the system turn", without_system
    yield "the prompt's first token is missing", cut(1, None)
    yield "the prompt's last token is missing", cut(0, -1)
    yield "one image token for each image, and no pixels", unexpanded
    yield "twice the image tokens, the second half without pixels", expanded_twice
    yield "logits taken one token too late", lambda case: replace(case.plain, late=1)
    yield "logits taken one token too early", lambda case: replace(case.plain, late=-1)
    for by, where in ((1, "later"), (-1, "earlier")):
        yield f"log-probabilities written one token {where}", _rolled(by)


def _rolled(by: int) -> Change:
    def change(case: Case) -> ModelInput | None:
        # Of a single token nothing would be left to compare.
        return replace(case.plain, rolled=by) if len(case.plain.response) > 1 else None

    return change


def _flags(prompt: EncodedPrompt) -> list[bool]:
    """[P]: where an image begins."""
    flags = [False] * len(prompt.token_ids)
    for start in prompt.image_starts:
        flags[start] = True
    return flags


def _order_changes(max_images: int) -> Iterator[tuple[str, Change]]:
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
    if 2 < max_images <= ALL_ORDERS_UP_TO:
        for order in permutations(range(max_images)):
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


def _pixel_changes(encoder: PromptEncoder) -> Iterator[tuple[str, Change]]:
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


def _position_changes() -> Iterator[tuple[str, Change]]:
    def moved(case: Case, positions: np.ndarray) -> ModelInput | None:
        right = position_ids(case.plain.prompt, len(case.plain.response))
        return None if np.array_equal(positions, right) else replace(case.plain, positions=positions)

    def text(case: Case) -> ModelInput | None:
        length = len(case.plain.prompt.token_ids) + len(case.plain.response)
        return moved(case, np.tile(np.arange(length), (3, 1)))

    def response_from(start: Callable[[int, int], int]) -> Change:
        def change(case: Case) -> ModelInput | None:
            num_prompt, count = len(case.plain.prompt.token_ids), len(case.plain.response)
            positions = position_ids(case.plain.prompt, count).copy()
            positions[:, num_prompt:] = start(num_prompt, int(positions[0, num_prompt])) + np.arange(count)
            return moved(case, positions)

        return change

    def with_grids(grids: Callable[[Case], np.ndarray]) -> Change:
        def change(case: Case) -> ModelInput | None:
            prompt = replace(case.plain.prompt, grids=grids(case))
            if not np.array_equal(prompt.grids.prod(axis=1), case.plain.prompt.grids.prod(axis=1)):
                return moved(case, _stretched(case.plain, prompt.grids))
            return moved(case, position_ids(prompt, len(case.plain.response)))

        return change

    def transposed(case: Case) -> np.ndarray:
        return case.plain.prompt.grids[:, [0, 2, 1]]

    def original(case: Case) -> np.ndarray:
        return case.plain.prompt.grids[list(invert(case.rollout.order))]

    yield "text positions: 0, 1, 2, … on all three axes", text
    yield "the response continues at the prompt's length", response_from(lambda length, right: length)
    yield "the response's positions are one too large", response_from(lambda length, right: right + 1)
    yield "the response's positions are one too small", response_from(lambda length, right: right - 1)
    yield "height and width of the images' positions swapped", with_grids(transposed)
    yield "image positions of the record's original order", with_grids(original)


def _stretched(plain: ModelInput, grids: np.ndarray) -> np.ndarray:
    """Positions of other images than the tokens', as long: those of the prompt that these images would have made."""
    images = [
        ImageInput(str(number), np.zeros(0, np.float32), (t, h, w)) for number, (t, h, w) in enumerate(grids.tolist())
    ]
    pad = int(plain.prompt.token_ids[plain.prompt.image_starts[0]])
    return position_ids(expand(plain.prompt.compact_ids, images, pad), len(plain.response))
