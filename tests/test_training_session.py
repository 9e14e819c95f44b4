"""What a session keeps, measures and expects, without a policy (with one: tests/end_to_end)."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from session_case import Evaluation, start
from small_disk import Ballast, small_disk

from perl_megatron import training_session
from perl_megatron.errors import UserError
from perl_megatron.observability.json_lines import read_rows
from perl_megatron.training_session import TrainingSession

BEST = ("run.keep_best=evaluation/accuracy", "run.keep_checkpoints=1")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next evaluations find."""
    found: list[float] = []
    monkeypatch.setattr(training_session, "evaluate", lambda *args: Evaluation(found.pop(0)))
    monkeypatch.setattr(TrainingSession, "_export", lambda session, step: None)
    return found


def scores(directory: Path) -> dict[str, Any]:
    """Checkpoint → the value that its manifest has."""
    manifests = sorted((directory / "run" / "checkpoints").glob("step-*/manifest.json"))
    return {path.parent.name: json.loads(path.read_text()).get("score", {}).get("value") for path in manifests}


def test_an_evaluation_that_was_made_up_for_gives_its_checkpoint_a_score(
    stack: ExitStack, accuracies: list[float], tmp_path: Path
) -> None:
    """The grace period was over before it; the resumed run makes up for it, and keeps that checkpoint as the best."""
    with stack:
        session = start(stack, tmp_path, *BEST, "run.steps=9")
        assert session.restore() == 0
        session.save(2)
    with ExitStack() as again:
        session = start(again, tmp_path, *BEST, "run.steps=9", resume=True)
        assert session.restore() == 2
        accuracies += [0.9, 0.1]
        session.evaluate(2)
        assert scores(tmp_path) == {"step-00000002": 0.9}
        session.evaluate(3)
        for step in (3, 4):
            session.save(step)
    assert scores(tmp_path) == {"step-00000002": 0.9, "step-00000004": None}


def test_a_step_is_saved_before_it_is_evaluated(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in an evaluation goes on from its step, and makes up for it."""

    def killed(*arguments: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(training_session, "evaluate", killed)
    with stack:
        session = start(stack, tmp_path, "run.save_every=2", "evaluation.every=2")
        session.restore()
        session.journal.step(2, {"loss": 0.5})
        with pytest.raises(SystemExit):
            session.save_and_evaluate_if_due(2)
    with ExitStack() as again:
        session = start(again, tmp_path, "run.save_every=2", "evaluation.every=2", resume=True)
        assert session.restore() == 2
        assert session.owes_evaluation(2)
    with ExitStack() as last:
        session = start(last, tmp_path / "complete", "run.steps=3", "run.save_every=0", "evaluation.every=0")
        session.restore()
        with pytest.raises(SystemExit):
            session.finish(3)
    assert list(scores(tmp_path / "complete")) == ["step-00000003"]


def test_an_evaluation_does_not_wait_for_the_checkpoint_that_gets_its_score(
    stack: ExitStack, accuracies: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(stack, tmp_path, *BEST, "run.save_every=2", "evaluation.every=2")
    session.restore()
    written, prepare = threading.Event(), session.actor.prepare_save

    def slowly(*arguments: Any) -> Any:
        write = prepare(*arguments)
        return lambda: (written.wait(), write())[1]

    monkeypatch.setattr(session.actor, "prepare_save", slowly)
    accuracies += [0.9, 0.1]
    session.save_and_evaluate_if_due(2)
    assert scores(tmp_path) == {}
    written.set()
    session.save_and_evaluate_if_due(4)
    session.save(6)
    assert scores(tmp_path) == {"step-00000002": 0.9, "step-00000006": None}


def test_an_evaluation_is_no_time_of_a_step_and_its_checkpoint_is_of_the_next(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]

    def evaluate(*arguments: Any) -> Evaluation:
        clock[0] += 40
        return Evaluation(0.5)

    def take(*arguments: Any, **options: Any) -> SimpleNamespace:
        clock[0] += 5
        return SimpleNamespace(seconds=5.0, num_bytes=0, num_tensors=0, attest_seconds=0.0)

    session = start(stack, tmp_path, "run.save_every=2", "evaluation.every=2", "run.asynchronous_checkpoints=false")
    session.restore()
    prepare = session.actor.prepare_save

    def slowly(*arguments: Any) -> Any:
        clock[0] += 3
        return prepare(*arguments)

    monkeypatch.setattr("perl_megatron.observability.phases.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(training_session, "evaluate", evaluate)
    monkeypatch.setattr(session.engine, "update_weights", take)
    monkeypatch.setattr(session.actor, "prepare_save", slowly)
    session.phases.take()
    session.save_and_evaluate_if_due(2)
    assert session.phases.elapsed == 3.0
    clock[0] += 2
    assert session.phases.take() == {"seconds/save": 3.0, "seconds/step": 5.0}
    assert session._grace._took["seconds/evaluate"] == 45.0


def test_a_worse_one_that_was_only_the_newest_goes_when_a_better_one_has_its_score(
    stack: ExitStack, accuracies: list[float], tmp_path: Path
) -> None:
    session = start(stack, tmp_path, *BEST)
    session.restore()
    accuracies += [0.4, 0.6]
    session.evaluate(1)
    session.save(1)
    session.save(2)
    assert scores(tmp_path) == {"step-00000001": 0.4, "step-00000002": None}
    session.evaluate(2)
    assert scores(tmp_path) == {"step-00000002": 0.6}


def test_killed_between_an_evaluation_and_the_score(
    stack: ExitStack, accuracies: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies.append(0.5)
    with stack:
        session = start(stack, tmp_path, *BEST)
        session.restore()
        session.save(2)
        monkeypatch.setattr(session, "score_if_saved", lambda step: None)
        session.evaluate(2)
    assert scores(tmp_path) == {"step-00000002": None}
    with ExitStack() as again:
        start(again, tmp_path, *BEST, resume=True).restore()
        assert scores(tmp_path) == {"step-00000002": 0.5}


def test_the_last_evaluation_counts_where_the_last_step_was_saved_before_it(
    stack: ExitStack, accuracies: list[float], tmp_path: Path
) -> None:
    session = start(stack, tmp_path, *BEST, "run.steps=4", "run.save_every=2", "evaluation.every=3")
    session.restore()
    accuracies += [0.2, 0.8]
    session.evaluate(2)
    session.save_if_due(2)
    session.save_and_evaluate_if_due(4)
    assert scores(tmp_path) in ({"step-00000002": 0.2}, {"step-00000002": 0.2, "step-00000004": None})
    session.finish(4)
    assert scores(tmp_path) == {"step-00000004": 0.8}


def test_a_score_that_cannot_be_written_costs_nothing_else(
    stack: ExitStack, accuracies: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(stack, tmp_path, *BEST)
    session.restore()
    session.save(2)
    notes: list[str] = []
    monkeypatch.setattr(session.journal, "note", notes.append)
    accuracies.append(0.5)

    def fail(source: str, target: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("perl_megatron.checkpoint.retention.os.replace", fail)
    session.evaluate(2)
    assert "Permission denied" in "\n".join(notes)
    assert "does not count as the best" in "\n".join(notes)
    assert [path.name for path in (tmp_path / "run/checkpoints/step-00000002").iterdir() if "tmp" in path.name] == []
    assert scores(tmp_path) == {"step-00000002": None}


def test_what_the_last_save_took_is_not_time_of_the_step_that_is_under_way(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the rest of the step seems as much shorter as the save was long."""
    session = start(stack, tmp_path, "launch.grace_seconds=60")
    session.restore()
    clock = [100.0]
    monkeypatch.setattr("perl_megatron.observability.phases.time.perf_counter", lambda: clock[0])
    session.phases.take()
    with session.phases("save", step=1):
        clock[0] += 40
    clock[0] += 2
    asked: list[float] = []
    monkeypatch.setattr(session._grace, "is_over_before_step", lambda elapsed: asked.append(elapsed) is None)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert session.collector.asks_to_stop()  # type: ignore[union-attr]
    assert asked == [2.0]


def test_updates_that_were_skipped_in_a_row_are_counted_on(stack: ExitStack, tmp_path: Path) -> None:
    with stack:
        session = start(stack, tmp_path)
        session.restore()
        session._skipped.load_state(["step-000001", "step-000002"])
        session.save(2)
    with ExitStack() as again:
        session = start(again, tmp_path, resume=True)
        session.restore()
        assert session._skipped.state() == ["step-000001", "step-000002"]


def test_every_part_is_closed_though_another_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, stack = list[str](), ExitStack()
    session = start(stack, tmp_path)
    session.restore()
    close_journal = session.journal.close

    def fail() -> None:
        close_journal()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(session.journal, "close", fail)
    monkeypatch.setattr(session.engine, "close", lambda: closed.append("engine"))
    monkeypatch.setattr(session.collector, "close", lambda: closed.append("collector"))
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    take_lock = [sys.executable, "-c", lock, str(tmp_path / "run" / "lock")]
    assert subprocess.run(take_lock, stderr=subprocess.DEVNULL, check=False).returncode == 1
    with pytest.raises(OSError, match="Input/output error"), stack:
        pass
    assert closed == ["collector", "engine"]
    assert subprocess.run(take_lock, check=False).returncode == 0


def test_a_full_disk_costs_neither_the_run_nor_a_row(
    stack: ExitStack, accuracies: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stack.enter_context(small_disk(tmp_path / "disk", num_kib=256))
    ballast, options = Ballast(folder), ("run.steps=6", "run.save_every=2", "evaluation.every=3")
    with ExitStack() as first:
        session = start(first, folder, *options)
        session.restore()
        accuracies += [0.1, 0.2]
        for step in range(1, 7):
            session.journal.groups(step, [{"step": step, "text": "x" * 9000}])
            session.journal.step(step, {"loss": 0.5})
            session.save_and_evaluate_if_due(step)
            if step == 2:
                session._writer.wait()
                ballast.fill()
        with pytest.raises(UserError, match="No space left"):  # as before: the policy could not be kept otherwise
            session.finish(6)
        assert scores(folder) == {"step-00000002": None}
        assert len(read_rows(session.folder.groups)) == 2
        ballast.free()
    assert [row["step"] for row in read_rows(session.folder.metrics)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert len(read_rows(session.folder.groups)) == 6
    output = capsys.readouterr().err
    assert output.count("the disk is full") == 1
    assert "the last checkpoint failed, see above; the run goes on" in output
    assert output.splitlines()[-1] == "[run] the disk was full; missing: answers of evaluations (2)"
    with ExitStack() as again:
        assert start(again, folder, *options, resume=True).restore() == 2
    ballast.fill()
    with ExitStack() as again, pytest.raises(UserError, match="No space left"):
        start(again, folder, *options, resume=True).restore()
    assert [row["step"] for row in read_rows(session.folder.metrics)] == [1, 2]
