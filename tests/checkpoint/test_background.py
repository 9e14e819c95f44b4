"""Checkpoints that are written beside the training, in one process (several: tests/end_to_end/test_survival.py)."""

import resource
import threading

import numpy as np
import pytest
from actor_case import make_config, weights_of

from perl_megatron.checkpoint.background import BackgroundWriter
from perl_megatron.checkpoint.retention import Retention, list_checkpoints
from perl_megatron.errors import UserError
from perl_megatron.train.actor import Actor


@pytest.fixture
def actor(case, topology, encoder):
    return Actor(make_config(case), topology, encoder, total_steps=10)


@pytest.fixture
def writer():
    return BackgroundWriter(asynchronous=True, timeout_seconds=60)


class Gate:
    """A write that begins only when it may."""

    def __init__(self, write):
        self._write, self._may = write, threading.Event()

    def __call__(self):
        self._may.wait(60)
        return self._write()

    def open(self):
        self._may.set()


@pytest.mark.parametrize("distributed", [True, False])
def test_what_is_written_is_the_state_of_the_time_of_the_copy(
    distributed, case, topology, encoder, sequences, writer, tmp_path
):
    """Where the optimizer is not distributed, its states are no parts of larger buffers, which are copied anyway."""
    config = make_config(case, optimizer={"distributed": distributed})
    actor = Actor(config, topology, encoder, total_steps=10)
    actor.supervised_update(sequences)
    before = weights_of(actor)
    gate = Gate(actor.prepare_save(tmp_path, 1, {"cursor": 7}, Retention()))
    writer.start(gate)
    expected = [actor.supervised_update(sequences) for _ in range(2)]  # in place, while nothing is written yet
    assert any(not np.array_equal(value, before[name]) for name, value in weights_of(actor).items())
    assert list_checkpoints(tmp_path) == []
    assert writer.take_times() == {}, "it is not written yet"
    gate.open()
    writer.wait()
    assert set(writer.take_times()) == {"save/background_seconds", "save/background_cpu_seconds"}
    resumed = Actor(config, topology, encoder, total_steps=10)
    assert resumed.restore(list_checkpoints(tmp_path)[0]) == {"cursor": 7}
    assert all(np.array_equal(value, before[name]) for name, value in weights_of(resumed).items())
    assert [resumed.supervised_update(sequences) for _ in range(2)] == expected


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_told_once_and_leaves_what_was_there(actor, tmp_path, caplog, asynchronous):
    actor.save(tmp_path, 1, {})
    writer = BackgroundWriter(asynchronous=asynchronous, timeout_seconds=60)
    write = actor.prepare_save(tmp_path, 2, {}, Retention())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        writer.start(write)
        with pytest.raises(UserError, match="cannot write the checkpoint"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "earlier ones are as they were" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    writer.wait()
    writer.start(actor.prepare_save(tmp_path, 3, {}, Retention()))
    writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]


def test_an_error_that_is_no_users_is_raised_where_it_is_waited_for(writer):
    def fail():
        raise ZeroDivisionError

    writer.start(fail)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()
    assert writer.take_times() == {}


def test_a_failure_that_nobody_waits_for_is_logged_with_its_cause(writer, caplog):
    def fail():
        raise RuntimeError("the archive's writer failed") from OSError(5, "Input/output error")

    writer.start(fail)
    writer.close()
    for text in ("rank 0", "the archive's writer failed", "Input/output error", "Traceback"):
        assert text in caplog.text


def test_another_runs_and_another_models_checkpoints_are_passed_over(actor, tmp_path, caplog):
    for step, run in ((1, "ours"), (2, "theirs")):
        actor.prepare_save(tmp_path, step, {}, Retention(run=run))()
    assert actor.newest_checkpoint(tmp_path, run="ours") == tmp_path / "step-00000001"
    assert "belongs to another run: theirs, not ours" in caplog.text
    assert actor.newest_checkpoint(tmp_path, run=None) == tmp_path / "step-00000002"
    foreign = Retention(run="ours")
    state = tmp_path / "step-00000003"
    actor.prepare_save(tmp_path, 3, {}, foreign)()
    replace(state / "training_state.json", "Qwen2.5-VL, 2 layers", "Qwen2.5-VL, 9 layers")
    assert actor.newest_checkpoint(tmp_path, run="ours") == tmp_path / "step-00000001"
    assert "belongs to another model: Qwen2.5-VL, 9 layers" in caplog.text


def replace(file, old, new):
    """Change a file of a checkpoint, and what the manifest says of it."""
    from perl_megatron.checkpoint.manifest import MANIFEST, file_entry

    manifest = file.with_name(MANIFEST)
    before = file_entry(file)["sha256"]
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    manifest.write_text(manifest.read_text().replace(before, file_entry(file)["sha256"]))
