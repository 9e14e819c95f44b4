"""The batch of an update that was skipped, on disk: `batch.safetensors` (numbers and pixels) and `batch.json`.

Prompts are kept once each, with their images by content hash; a sequence names its prompt. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from perl_megatron.errors import UserError
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.types import EncodedPrompt

FORMAT = 1
TENSORS, DESCRIPTION = "batch.safetensors", "batch.json"
PER_TOKEN = ("logprob_old", "logprob_ref", "importance")
"""Fields of a sequence that have a value for each response token, or are None."""


@dataclass(frozen=True)
class SkippedBatch:
    """What an update was given."""

    sequences: tuple[TrainingSequence, ...]
    pixels: Mapping[str, np.ndarray]
    """Content hash → uint8 [height, width, 3] of every image of the prompts."""
    step: int
    """Steps that the weights had made."""
    update: int
    """Which update of the next step this was, from 1: the weights had made those before it too."""
    supervised: bool
    """Whether the loss was cross-entropy."""
    metrics: Mapping[str, float]
    """What the update returned; numbers that are not finite included."""


def save_batch(
    folder: Path, sequences: Sequence[TrainingSequence], pixels: Callable[[str], np.ndarray], **about: Any
) -> None:
    """Write a batch; the folder appears whole. ``about``: the other fields of ``SkippedBatch``. OSError if it fails."""
    prompts = list({id(sequence.prompt): sequence.prompt for sequence in sequences}.values())
    number = {id(prompt): index for index, prompt in enumerate(prompts)}
    tensors: dict[str, np.ndarray] = {"advantage": np.array([one.advantage for one in sequences], dtype=np.float64)}
    for index, prompt in enumerate(prompts):
        tensors[f"prompt/{index}/token_ids"] = prompt.token_ids
        tensors[f"prompt/{index}/compact_ids"] = np.array(prompt.compact_ids, dtype=np.int64)
        tensors[f"prompt/{index}/image_starts"] = np.array(prompt.image_starts, dtype=np.int64)
        tensors[f"prompt/{index}/grids"] = np.asarray(prompt.grids).reshape(-1, 3)
    for index, sequence in enumerate(sequences):
        tensors[f"sequence/{index}/response"] = sequence.response
        for name in PER_TOKEN:
            value = getattr(sequence, name)
            if value is not None:
                tensors[f"sequence/{index}/{name}"] = value
    for key in sorted({key for prompt in prompts for key in prompt.image_keys}):
        tensors[f"image/{key}"] = pixels(key)
    metrics = {name: value if math.isfinite(value) else repr(value) for name, value in about["metrics"].items()}
    description = {
        "format": FORMAT,
        "step": about["step"],
        "update": about["update"],
        "supervised": about["supervised"],
        "metrics": metrics,
        "prompts": [list(prompt.image_keys) for prompt in prompts],
        "sequences": [number[id(sequence.prompt)] for sequence in sequences],
    }
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, fresh / TENSORS)
        (fresh / DESCRIPTION).write_text(json.dumps(description, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier start of this run
        fresh.rename(folder)
    except SafetensorError as error:  # a full disk, in its own words
        raise OSError(errno.EIO, str(error)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # where not all of it could be written


def load_batch(folder: Path) -> SkippedBatch:
    """Read a batch. UserError where it is not there, or is not whole."""
    fix = "give a folder below RUN/skipped, such as runs/NAME/skipped/step-000012"
    if not (folder / DESCRIPTION).is_file():
        raise UserError("there is no batch of a skipped update", where=str(folder), fix=fix)
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if about["format"] != FORMAT:
            raise UserError(f"the batch has format {about['format']}, not {FORMAT}", where=str(folder), fix=fix)
        prompts = [_prompt(tensors, index, keys) for index, keys in enumerate(about["prompts"])]
        sequences = tuple(_sequence(tensors, index, prompts[prompt]) for index, prompt in enumerate(about["sequences"]))
        pixels = {key: tensors[f"image/{key}"] for keys in about["prompts"] for key in keys}
        metrics = {name: float(value) for name, value in about["metrics"].items()}
        own = {name: about[name] for name in ("step", "update", "supervised")}
        return SkippedBatch(sequences, pixels, metrics=metrics, **own)
    except (OSError, ValueError, KeyError, IndexError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the batch is damaged: {error!r}", where=str(folder), fix=fix) from error


def _prompt(tensors: Mapping[str, np.ndarray], index: int, keys: Sequence[str]) -> EncodedPrompt:
    return EncodedPrompt(
        token_ids=tensors[f"prompt/{index}/token_ids"],
        compact_ids=tuple(tensors[f"prompt/{index}/compact_ids"].tolist()),
        image_starts=tuple(tensors[f"prompt/{index}/image_starts"].tolist()),
        grids=tensors[f"prompt/{index}/grids"],
        image_keys=tuple(keys),
    )


def _sequence(tensors: Mapping[str, np.ndarray], index: int, prompt: EncodedPrompt) -> TrainingSequence:
    per_token = {name: tensors.get(f"sequence/{index}/{name}") for name in PER_TOKEN}
    advantage = float(tensors["advantage"][index])
    return TrainingSequence(prompt, tensors[f"sequence/{index}/response"], advantage=advantage, **per_token)
