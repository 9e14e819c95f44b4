"""Which batches are kept, and when skipped updates end a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perl_megatron import skipped
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.skipped import SkippedUpdates
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.skipped_batch import load_batch
from perl_megatron.types import EncodedPrompt

PROMPT = EncodedPrompt(np.arange(3), (0, 1, 2), (0,), np.array([[1, 2, 2]]), ("key",))
BATCH = [TrainingSequence(PROMPT, np.arange(2), advantage=1.0)]
GOOD = {"loss": 0.5, "gradient_norm": 1.0, "skipped_updates": 0.0}
BAD = {"loss": float("nan"), "gradient_norm": float("inf"), "skipped_updates": 1.0}


def follower(folder: Path, notes: list[str], limit: int) -> SkippedUpdates:
    config = Config.model_validate(
        {
            "model": {"path": folder},
            "run": {"directory": folder, "seed": 9},
            "optimizer": {"max_skipped_updates": limit},
        }
    )
    return SkippedUpdates(config, lambda key: Image.new("RGB", (28, 28), "red"), supervised=False, note=notes.append)


def test_only_skipped_updates_in_a_row_end_the_run(tmp_path: Path) -> None:
    notes: list[str] = []
    updates = follower(tmp_path, notes, limit=3)
    for step, metrics in enumerate([BAD, BAD, GOOD, BAD, BAD]):
        updates.follow(step, BATCH, metrics)
    with pytest.raises(UserError) as error:
        updates.follow(4, BATCH, BAD)  # the second update of the fifth step
    folder = tmp_path / "run" / "skipped"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-00000{name}" for name in ("1", "2", "4", "5", "5-2")
    ]
    for name in ("4", "5", "5-2"):
        assert str(folder / f"step-00000{name}") in str(error.value.where)
    assert "step-000002" not in str(error.value)
    assert f"perl-megatron replay {folder / 'step-000004'}" in str(error.value.fix)
    assert notes[0] == f"step 1: skipped an update (loss nan, gradient norm inf); its batch is in {folder}/step-000001"
    batch = load_batch(folder / "step-000005-2")
    assert (batch.step, batch.update, batch.seed) == (4, 2, 9)
    assert batch.metrics["gradient_norm"] == float("inf")
    assert batch.pixels["key"][0, 0].tolist() == [255, 0, 0]


def test_old_batches_make_room(tmp_path: Path) -> None:
    updates = follower(tmp_path, [], limit=100)
    for step in range(skipped.KEPT + 3):
        updates.follow(step, BATCH, BAD)
    names = sorted(path.name for path in (tmp_path / "run" / "skipped").iterdir())
    assert names == [f"step-{step:06d}" for step in range(4, skipped.KEPT + 4)]


def test_training_goes_on_where_a_batch_cannot_be_written(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "skipped").write_text("no folder")
    updates = follower(tmp_path, notes, limit=5)
    updates.follow(0, BATCH, BAD)
    assert "cannot be kept" in notes[0]
