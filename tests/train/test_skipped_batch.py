"""The batch of a skipped update comes back from the disk as it was."""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.errors import UserError
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.skipped_batch import DESCRIPTION, PER_TOKEN, TENSORS, load_batch, save_batch
from perl_megatron.types import EncodedPrompt

NUMBERS = st.floats(width=32)
"""Infinite ones and NaN too."""


def pixels(key: str) -> np.ndarray:
    return np.full((28, 28 * int(key), 3), int(key), dtype=np.uint8)


@st.composite
def batches(draw: st.DrawFn) -> list[TrainingSequence]:
    prompts = []
    for _ in range(draw(st.integers(1, 3))):
        keys = tuple(draw(st.lists(st.sampled_from("123"), max_size=3)))
        ids = np.array(draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=6)), dtype=np.int64)
        grids = np.array([(1, 2, 2 * int(key)) for key in keys], dtype=np.int64).reshape(-1, 3)
        prompts.append(EncodedPrompt(ids, tuple(ids.tolist()), tuple(range(len(keys))), grids, keys))
    sequences = []
    for _ in range(draw(st.integers(1, 4))):
        response = np.array(draw(st.lists(st.integers(0, 99), max_size=4)), dtype=np.int64)
        given_fields = {
            name: np.array([draw(NUMBERS) for _ in response], dtype=np.float64 if name == "importance" else np.float32)
            for name in PER_TOKEN
            if draw(st.booleans())
        }
        prompt = draw(st.sampled_from(prompts))
        sequences.append(TrainingSequence(prompt, response, advantage=draw(NUMBERS), **given_fields))
    return sequences


@settings(deadline=None, max_examples=40)
@given(sequences=batches(), loss=NUMBERS)
def test_it_comes_back_as_it_was(sequences: list[TrainingSequence], loss: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "skipped" / "step-000003"
        save_batch(path, sequences, pixels, step=2, update=3, supervised=False, metrics={"loss": loss})
        batch = load_batch(path)
    assert (batch.step, batch.update, batch.supervised) == (2, 3, False)
    np.testing.assert_equal(batch.metrics["loss"], loss)
    assert len(batch.sequences) == len(sequences)
    for read, written in zip(batch.sequences, sequences, strict=True):
        np.testing.assert_equal(read.advantage, written.advantage)
        for name in ("response", *PER_TOKEN):
            np.testing.assert_equal(getattr(read, name), getattr(written, name))
        for field in fields(EncodedPrompt):
            np.testing.assert_equal(getattr(read.prompt, field.name), getattr(written.prompt, field.name))
        for key in written.prompt.image_keys:
            np.testing.assert_equal(batch.pixels[key], pixels(key))
    # Sequences of one prompt still share it: the actor computes it once.
    same = [a.prompt is b.prompt for a in sequences for b in sequences]
    assert [a.prompt is b.prompt for a in batch.sequences for b in batch.sequences] == same


def test_what_is_no_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no batch") as error:
        load_batch(tmp_path)
    assert str(tmp_path) in str(error.value)
    prompt = EncodedPrompt(np.arange(3), (0, 1, 2), (), np.zeros((0, 3), np.int64), ())
    path = tmp_path / "step-000001"
    save_batch(path, [TrainingSequence(prompt, np.arange(2))], pixels, step=0, update=1, supervised=True, metrics={})
    assert sorted(file.name for file in path.iterdir()) == [DESCRIPTION, TENSORS]
    content = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(content[:-5])
    with pytest.raises(UserError, match="the batch is damaged"):
        load_batch(path)
    (path / TENSORS).write_bytes(content)
    about = json.loads((path / DESCRIPTION).read_text())
    (path / DESCRIPTION).write_text(json.dumps({**about, "sequences": [7]}))
    with pytest.raises(UserError, match="the batch is damaged"):
        load_batch(path)
