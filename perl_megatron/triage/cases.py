"""A recorded rollout as the model reads it, and whether the record is still what it was.

P prompt tokens, R response tokens, I images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from perl_megatron.data.images import image_key, load_image
from perl_megatron.data.processor import MERGE_SIZE, PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.model.mrope import position_ids
from perl_megatron.triage.dump import RECORD_AGAIN, RecordedRollout
from perl_megatron.triage.verdicts import Cause, Finding
from perl_megatron.types import EncodedPrompt, View

CONTEXT_TOKENS = 8
"""So many tokens before and after the first difference are shown."""


@dataclass(frozen=True)
class ImageInput:
    """One image for the vision tower."""

    key: str
    """Names the numbers: equal keys, equal patches."""
    patches: np.ndarray
    """float32 [t·h·w, 1176]."""
    grid: tuple[int, int, int]
    """(time, height, width) in patches."""

    @property
    def num_tokens(self) -> int:
        """Image tokens of the language model."""
        return int(np.prod(self.grid)) // MERGE_SIZE**2


@dataclass(frozen=True)
class ModelInput:
    """What one forward pass takes."""

    prompt: EncodedPrompt
    """Its ``image_starts`` and ``grids`` say which tokens are filled with image features."""
    response: np.ndarray
    """int64 [R]."""
    images: tuple[ImageInput, ...]
    """In the order in which their features fill the prompt's image tokens."""
    positions: np.ndarray | None = None
    """int64 [3, P + R]; None: transformers' own."""
    late: int = 0
    """So many positions behind the right one are the logits taken from."""
    rolled: int = 0
    """By so many tokens are the log-probabilities moved to the right."""


@dataclass(frozen=True)
class Case:
    """A rollout and its right input."""

    rollout: RecordedRollout
    plain: ModelInput


Change = Callable[[Case], ModelInput | None]
"""What a fault makes of the right input; None for a rollout whose input it does not change."""

Positions = Callable[[EncodedPrompt, np.ndarray], np.ndarray]
"""transformers' positions of a prompt and a response: int64 [3, P + R]."""


def make_cases(
    rollouts: Sequence[RecordedRollout], encoder: PromptEncoder, images: Path, positions: Positions
) -> tuple[list[Case], list[Finding]]:
    """The rollouts whose images are what they were, and what is wrong with the records.

    Raises UserError where images were not recorded, or cannot be read.
    """
    cases, findings = [], []
    keys = sorted({key for rollout in rollouts for key in rollout.image_keys})
    changed = {key: text for key in keys if (text := _changed_image(images / f"{key}.png", key, encoder))}
    findings += [Finding(Cause.PIXELS, text) for text in changed.values()]
    for rollout in rollouts:
        if changed.keys() & set(rollout.image_keys):
            continue
        encoded = encoder.encode(_view(rollout, images))
        prompt = encoded
        if not np.array_equal(encoded.token_ids, rollout.prompt_ids):
            findings.append(Finding(Cause.TOKEN_IDS, first_difference(rollout, encoded.token_ids, encoder)))
            prompt = recorded_prompt(rollout.prompt_ids, encoded, encoder.image_token_id) or encoded
        if encoder.decode(rollout.response_ids) != rollout.response:
            text = f"{rollout.name}: the response's token ids do not spell the recorded response {rollout.response!r}"
            findings.append(Finding(Cause.TOKEN_IDS, text))
        if not np.array_equal(position_ids(prompt, len(rollout.response_ids)), positions(prompt, rollout.response_ids)):
            text = f"{rollout.name}: the trainer's positions (perl_megatron/model/mrope.py) are not transformers'"
            findings.append(Finding(Cause.POSITIONS, text))
        cases.append(Case(rollout, ModelInput(prompt, rollout.response_ids, _image_inputs(encoded, encoder))))
    return cases, findings


def first_difference(rollout: RecordedRollout, expected: np.ndarray, encoder: PromptEncoder) -> str:
    """Where the recorded prompt and what the processor makes of the question now differ first, in words."""
    recorded = rollout.prompt_ids
    common = min(len(recorded), len(expected))
    differs = np.flatnonzero(recorded[:common] != expected[:common])
    first = int(differs[0]) if len(differs) else common

    def around(ids: np.ndarray) -> str:
        part = ids[max(0, first - CONTEXT_TOKENS) : first + CONTEXT_TOKENS].tolist()
        return repr(encoder.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return (
        f"{rollout.name}: the recorded prompt ({len(recorded)} tokens) is not what the processor makes of the question "
        f"now ({len(expected)} tokens); the first difference is token {first}: recorded …{around(recorded)}…, "
        f"now …{around(expected)}…"
    )


def recorded_prompt(ids: np.ndarray, encoded: EncodedPrompt, image_token_id: int) -> EncodedPrompt | None:
    """The recorded ids with the images of ``encoded``; None where the image tokens do not fit the images."""
    starts, lengths, token = [], [], 0
    for is_image, run in groupby((ids == image_token_id).tolist()):
        length = len(list(run))
        if is_image:
            starts.append(token)
            lengths.append(length)
        token += length
    if lengths != (encoded.grids.prod(axis=1) // MERGE_SIZE**2).tolist():
        return None
    return EncodedPrompt(ids, collapse(ids, image_token_id), tuple(starts), encoded.grids, encoded.image_keys)


def collapse(ids: np.ndarray, image_token_id: int) -> tuple[int, ...]:
    """The ids with one image token for each image."""
    again = np.zeros(len(ids), dtype=bool)
    again[1:] = (ids[1:] == image_token_id) & (ids[:-1] == image_token_id)
    return tuple(ids[~again].tolist())


def _view(rollout: RecordedRollout, images: Path) -> View:
    paths = tuple(images / f"{key}.png" for key in rollout.image_keys)
    return View(rollout.record, rollout.view, rollout.order, paths, rollout.question, answer="", answer_type="text")


def _image_inputs(prompt: EncodedPrompt, encoder: PromptEncoder) -> tuple[ImageInput, ...]:
    pairs = zip(prompt.image_keys, prompt.grids.tolist(), strict=True)
    return tuple(ImageInput(key, encoder.patches(key), (t, h, w)) for key, (t, h, w) in pairs)


def _changed_image(path: Path, key: str, encoder: PromptEncoder) -> str | None:
    """What is wrong with a stored image, in words."""
    if not path.is_file():
        raise UserError("an image that a rollout saw was not recorded", where=str(path), fix=RECORD_AGAIN)
    image = load_image(path, encoder.min_pixels, encoder.max_pixels)
    if image_key(image) == key:
        return None
    return (
        f"{path}: the image, which is {image.width}x{image.height} pixels when it is read now, does not have the "
        "recorded content: the file was changed, or it is resized again under the present pixel bounds"
    )


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
