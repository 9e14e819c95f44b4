"""Which batches are kept, and when skipped updates end a run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from perl_megatron import skipped
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.skipped import SkippedUpdates
from perl_megatron.train import skipped_batch
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
            "run": {"directory": folder},
            "optimizer": {"max_skipped_updates": limit},
        }
    )
    return SkippedUpdates(config, lambda key: Image.new("RGB", (28, 28), "red"), supervised=False, note=notes.append)


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    """Else one that is preempted often would never end."""
    notes: list[str] = []
    updates = follower(tmp_path, notes, limit=3)
    for step in (0, 1):
        updates.follow(step, BATCH, BAD)
    state = updates.state()
    resumed = follower(tmp_path, notes, limit=3)
    resumed.load_state(state)
    with pytest.raises(UserError, match="3 updates in a row") as error:
        resumed.follow(2, BATCH, BAD)
    assert str(tmp_path / "run" / "skipped" / "step-000001") in str(error.value)
    resumed.load_state(state)
    resumed.follow(2, BATCH, GOOD)
    assert resumed.state() == []


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
    assert (batch.step, batch.update) == (4, 2)
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


def test_a_full_disk_or_a_changed_image_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def changed(key: str) -> Image.Image:
        raise UserError("the image has changed", where=key)

    notes: list[str] = []
    updates = follower(tmp_path, notes, limit=5)
    with monkeypatch.context() as patch:
        patch.setattr(skipped_batch, "save_file", full)
        updates.follow(0, BATCH, BAD)
    updates._image_of = changed
    updates.follow(1, BATCH, BAD)
    assert "cannot be kept: [Errno 5] I/O error: No space left" in notes[0]
    assert notes[1].endswith("its batch cannot be kept: the image has changed")
    assert list((tmp_path / "run" / "skipped").iterdir()) == []


def test_the_newest_batches_stay_whatever_their_step(tmp_path: Path) -> None:
    """Of a run that was resumed from an older checkpoint."""
    folder = tmp_path / "run" / "skipped"
    for step in range(50, 50 + skipped.KEPT):
        (folder / f"step-{step:06d}").mkdir(parents=True)
        os.utime(folder / f"step-{step:06d}", (step, step))
    follower(tmp_path, [], limit=5).follow(2, BATCH, BAD)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-000003", *(f"step-{step:06d}" for step in range(51, 50 + skipped.KEPT))]


def test_the_error_names_batches_that_are_there(tmp_path: Path) -> None:
    updates = follower(tmp_path, [], limit=skipped.KEPT + 2)
    for step in range(skipped.KEPT + 1):
        updates.follow(step, BATCH, BAD)
    with pytest.raises(UserError) as error:
        updates.follow(skipped.KEPT + 1, BATCH, BAD)
    named = str(error.value.where).splitlines()[1:]
    assert len(named) == skipped.KEPT
    assert all(Path(line.strip()).is_dir() for line in named)
    assert f"replay {named[0].strip()}`" in str(error.value.fix)


def test_batches_of_steps_that_are_made_anew_are_removed(tmp_path: Path) -> None:
    notes: list[str] = []
    updates = follower(tmp_path, [], limit=9)
    updates.forget_after(0)  # nothing is there yet
    for step in (1, 4, 4, 6):
        updates.follow(step, BATCH, BAD)
    follower(tmp_path, notes, limit=9).forget_after(4)
    assert [path.name for path in (tmp_path / "run" / "skipped").iterdir()] == ["step-000002"]
    assert notes == ["removed 3 batches of skipped updates after step 4: those steps are made anew"]
