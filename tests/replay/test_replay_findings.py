"""Real infinities in a tiny policy's batch and weights, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from actor_case import make_config, with_log_probs

from perl_megatron.checkpoint.manifest import PendingCheckpoint
from perl_megatron.checkpoint.retention import Retention, delete_checkpoint
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.replay.command import MAX_SHOWN, BatchEncoder, choose_weights, show
from perl_megatron.replay.findings import Finding, Findings, examine
from perl_megatron.runtime.topology import Topology
from perl_megatron.train.actor import Actor
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.skipped_batch import SkippedBatch, load_batch, save_batch


@pytest.fixture
def start(case: Path, topology: Topology, encoder: PromptEncoder) -> Callable[..., Actor]:
    return lambda other=None: Actor(make_config(case), topology, other or encoder, total_steps=10)


def batch_of(actor: Actor, sequences: Sequence[TrainingSequence], **changes: Any) -> SkippedBatch:
    """The scored sequences; of the fourth one some fields are others."""
    scored = with_log_probs(sequences, actor.log_probs(sequences), actor.reference_log_probs(sequences), noise=0.1)
    scored[3] = replace(scored[3], **changes)
    return SkippedBatch(tuple(scored), {}, 0, 1, False, {})


def found(findings: Findings, what: str) -> list[str]:
    return [finding.which for finding in findings.all if finding.what == what]


def decode(ids: Sequence[int]) -> str:
    return "text"


def test_a_batch_that_is_finite(start: Callable[..., Actor], sequences: list[TrainingSequence]) -> None:
    actor = start()
    findings = examine(actor, batch_of(actor, sequences), decode)
    assert findings.finite
    assert not findings.all
    assert findings.as_dict()["loss"] == findings.loss


@pytest.mark.parametrize(
    "changes", [{"advantage": float("nan")}, {"logprob_old": None}], ids=["advantage", "log-probability"]
)
def test_one_sequence_is_named(
    start: Callable[..., Actor], sequences: list[TrainingSequence], changes: dict[str, Any]
) -> None:
    actor = start()
    if "logprob_old" in changes:
        changes = {"logprob_old": np.full(len(sequences[3].response), np.nan, np.float32)}
    findings = examine(actor, batch_of(actor, sequences, **changes), decode)
    assert not findings.finite
    for what in ("input", "sequence gradient"):
        (name,) = found(findings, what)
        assert name.startswith("sequence 3: ")
    assert not found(findings, "weight")
    assert not found(findings, "module output")
    assert not found(findings, "log-probability")
    assert findings.as_dict()["loss"] == "nan"
    # The bounds of the ratio cut the gradient of a NaN to 0: the loss alone shows it.
    assert bool(found(findings, "parameter gradient")) == ("advantage" in changes)


def test_a_weight_is_named_with_the_first_module_that_shows_it(
    start: Callable[..., Actor], sequences: list[TrainingSequence]
) -> None:
    actor = start()
    batch = batch_of(actor, sequences)
    with torch.no_grad():
        actor.modules[0].get_parameter(_vision_bias(actor))[0] = torch.inf
    findings = examine(actor, batch, decode)
    (weight,) = found(findings, "weight")
    assert weight.startswith("visual.")
    modules = found(findings, "module output")
    assert modules
    assert "vision" in modules[0]
    without_images = {index for index, one in enumerate(batch.sequences) if not one.prompt.image_keys}
    bad = {int(name.split(":")[0].removeprefix("sequence ")) for name in found(findings, "sequence gradient")}
    assert bad == set(range(len(batch.sequences))) - without_images


def _vision_bias(actor: Actor) -> str:
    """A bias of the vision tower."""
    return next(name for name, _ in actor.modules[0].named_parameters() if "vision" in name and name.endswith("bias"))


def test_the_pixels_are_those_of_the_batch(
    start: Callable[..., Actor], sequences: list[TrainingSequence], encoder: PromptEncoder, case: Path, tmp_path: Path
) -> None:
    """The image files may be gone: the batch brings what it was computed from, and gives the same numbers."""
    actor = start()
    batch = batch_of(actor, sequences)
    path = tmp_path / "step-000001"
    about = {"step": 0, "update": 1, "supervised": False, "seed": 0, "metrics": {}}
    save_batch(path, batch.sequences, lambda key: np.asarray(encoder.image(key)), **about)
    read = load_batch(path)
    again = examine(start(BatchEncoder(case / "policy", read.pixels)), read, decode)
    before = examine(actor, batch, decode)
    assert (again.loss, again.gradient_norm) == (before.loss, before.gradient_norm)


def test_the_weights_are_the_newest_that_are_not_too_new(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    batch = SkippedBatch((), {}, 12, 1, False, {})
    assert choose_weights(folder, batch, None)[0] is None
    for step in (4, 8, 12, 16):
        save(folder, step)
    path, remark = choose_weights(folder, batch, None)
    assert path is not None
    assert path.name == "step-00000012"
    assert "the batch's own" in remark
    remark = choose_weights(folder, replace(batch, update=3), None)[1]
    assert "had made 12 steps and 2 updates" in remark
    delete_checkpoint(path)
    path, remark = choose_weights(folder, batch, None)
    assert path is not None
    assert path.name == "step-00000008"
    assert "had made 12 steps" in remark
    with pytest.raises(UserError, match="does not exist"):
        choose_weights(folder, batch, tmp_path / "nowhere")


def save(folder: RunFolder, step: int, run: str | None = None) -> Path:
    """A checkpoint as far as a choice looks at it."""
    pending = PendingCheckpoint.begin(folder.checkpoints, step)
    pending.write("training_state.json", "{}")
    return pending.commit(Retention(keep=9, run=run))


def test_damaged_weights_and_another_runs_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, batch = RunFolder(tmp_path), SkippedBatch((), {}, 12, 1, False, {})
    folder.identity.write_text("ours\n")
    for step, run in ((4, "ours"), (8, "theirs"), (12, "ours")):
        save(folder, step, run)
    (folder.checkpoints / "step-00000012" / "training_state.json").write_text("[]")
    path, remark = choose_weights(folder, batch, None)
    assert path == folder.checkpoints / "step-00000004"
    assert "weights after 4 steps; the batch's had made 12 steps" in remark
    assert "is not what was written" in caplog.text
    assert "belongs to another run: theirs, not ours" in caplog.text


def test_what_is_printed_may_hold_anything(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Finding("sequence gradient", f"sequence {number}: '[/red]'", "nan") for number in range(MAX_SHOWN + 3)]
    metrics = {"loss": float("nan"), "gradient_norm": 1.0}
    show(Findings(tuple(found), float("nan"), 1.0), SkippedBatch((), {}, 12, 1, False, metrics), "the weights")
    printed = capsys.readouterr().out
    assert "[/red]" in printed
    assert "… and 3 more" in printed
    assert "skipped with loss nan, gradient_norm 1" in printed
