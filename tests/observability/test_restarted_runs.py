"""What a run that was killed early leaves, and how the next start finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perl_megatron.config.load import LoadedConfig, load_config
from perl_megatron.errors import UserError
from perl_megatron.observability.group_ledger import GroupLedger
from perl_megatron.observability.metrics_log import MetricsLog
from perl_megatron.observability.run_folder import RunFolder


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedConfig:
    return load_config(None, ["model.path=m", f"run.directory={tmp_path / 'runs'}", "run.name=demo"])


def test_a_folder_appears_whole(loaded: LoadedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before it has its config, a run can neither be taken for one to resume nor be in the way of a new one."""

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perl_megatron.observability.run_folder.save_resolved", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.create(loaded, resume=False)
    assert not RunFolder.of(loaded.config).root.exists()
    monkeypatch.undo()
    folder = RunFolder.create(loaded, resume=False)
    assert folder.config.is_file()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]


def test_a_run_keeps_its_identity(loaded: LoadedConfig, tmp_path: Path) -> None:
    folder = RunFolder.create(loaded, resume=False)
    identity = folder.read_identity()
    assert identity
    RunFolder.create(loaded, resume=True)
    assert folder.read_identity() == identity
    other = load_config(None, ["model.path=m", f"run.directory={tmp_path / 'runs'}", "run.name=other"])
    assert RunFolder.create(other, resume=False).read_identity() != identity
    folder.identity.unlink()  # a run from before there was one
    assert folder.read_identity() is None
    assert RunFolder.create(loaded, resume=True).read_identity()


def test_a_run_that_begins_anew_has_its_steps_once(tmp_path: Path) -> None:
    """Killed before its first checkpoint; what was measured before the first step stays."""
    for _ in range(2):
        log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
        if not log.has(0, "evaluation/accuracy"):
            log.log(0, {"evaluation/accuracy": 0.5})
        log.log(1, {"loss": 1.0})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0)]
    assert [event.step for event in events.Scalars("evaluation/accuracy")] == [0]


def test_the_value_of_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    log.log(1, {"loss": 1.0})
    log.log(2, {"loss": float("nan")})
    log.log(2, {"entropy": 0.25})
    log.sync()
    assert (log.value(1, "loss"), log.value(2, "loss"), log.value(2, "entropy")) == (1.0, None, 0.25)
    log.close()
    again = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resumed_step=2)
    assert (again.value(1, "loss"), again.value(2, "loss"), again.value(3, "loss")) == (1.0, None, None)
    again.close()


def test_the_ledger_can_be_waited_for(tmp_path: Path) -> None:
    ledger = GroupLedger(tmp_path / "groups.jsonl")
    ledger.write(1, [{"step": 1}])
    ledger.sync()
    ledger.close()
    assert (tmp_path / "groups.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ['{"step": 1, "lo{"step": 2}', "\0" * 20, "7"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError, match="damaged") as caught:
        MetricsLog(path, tmp_path / "tensorboard", resumed_step=2)
    assert caught.value.where == f"{path}:2"
    assert path.read_text().count("\n") == 3, "it is as it was"
