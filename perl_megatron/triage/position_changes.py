"""Faults in the (time, height, width) positions of tokens that are right themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from perl_megatron.data.permutation import invert
from perl_megatron.model.mrope import position_ids
from perl_megatron.triage.cases import Case, Change, ImageInput, ModelInput, expand


def position_changes() -> Iterator[tuple[str, Change]]:
    """Name and change of each."""

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
