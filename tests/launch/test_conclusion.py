"""What is told of a job's end, and by which status (with real ranks: test_torchrun.py)."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path

import pytest
from small_disk import Ballast, small_disk

from perl_megatron.errors import UserError
from perl_megatron.launch.conclusion import conclude
from perl_megatron.launch.failures import (
    DIRECTORY_VARIABLE,
    ENDS_FILE,
    read_ends,
    record_ends,
    record_failure,
    stop_status,
    was_stopped,
)


@pytest.fixture
def failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ranks tell how they ended."""
    assert not record_failure(RuntimeError("nobody listens"))
    folder = tmp_path / "failures"
    folder.mkdir()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(folder))
    (tmp_path / "torchrun.log").write_text("what torchrun says\n")
    return folder


def record(monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception) -> None:
    monkeypatch.setenv("RANK", str(rank))
    assert record_failure(error)


def test_an_error_is_told_once_with_the_time_when_it_came(failures: Path) -> None:
    """The command line tells it again when the process groups are left, by when other ranks have told their echoes."""
    error = RuntimeError("the cause")
    assert record_failure(error)
    first = (failures / "rank-0.json").read_text()
    assert record_failure(error)
    assert (failures / "rank-0.json").read_text() == first
    assert record_failure(RuntimeError("another one"))
    assert "another one" in (failures / "rank-0.json").read_text()


def test_failures_are_ordered_and_told(
    failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conclude(1, tmp_path, ended_at_once=False) == 1
    assert "what torchrun says" in capsys.readouterr().err
    for rank, error in ((1, RuntimeError("first")), (0, RuntimeError("echo"))):
        record(monkeypatch, rank, error)
    record_ends({0: 1, 1: 1})
    assert conclude(1, tmp_path, ended_at_once=False) == 1
    assert "rank 1 failed first:\nRuntimeError: first\n" in capsys.readouterr().err
    assert conclude(1, tmp_path, ended_at_once=False, asked_by=signal.SIGUSR1) == 1
    record(monkeypatch, 2, UserError("a mistake", fix="mend it"))
    capsys.readouterr()
    assert conclude(1, tmp_path, ended_at_once=False, asked_by=signal.SIGUSR1) == 2
    assert capsys.readouterr().err == "error: a mistake\n  fix:   mend it\n"


@pytest.mark.parametrize(
    ("asked_by", "ends", "status", "told"),
    [
        (signal.SIGUSR1, {0: -10, 1: -10}, 75, "stopped before the first step"),
        (signal.SIGTERM, {1: -15}, 75, "stopped before the first step"),
        (signal.SIGINT, {0: -2, 1: 1}, 130, "stopped before the first step"),
        (signal.SIGUSR1, {1: -9}, 75, "rank 1 was killed by SIGKILL, after the run was told to stop (SIGUSR1)"),
        (signal.SIGUSR1, {0: 1, 1: -15}, 75, "rank 1 was killed by SIGTERM, after the run was told to stop (SIGUSR1)"),
        (signal.SIGTERM, {0: -10, 1: -10}, 75, "rank 1 was killed by SIGUSR1, after the run was told to stop"),
        (signal.SIGTERM, {0: -11}, 1, "rank 0 was killed by SIGSEGV, after the run was told to stop (SIGTERM)"),
        (signal.SIGUSR1, {0: -11}, 1, "rank 0 was killed by SIGSEGV, after the run was told to stop (SIGUSR1)"),
        (signal.SIGUSR1, {0: -6, 1: 1}, 1, "rank 0 was killed by SIGABRT, after the run was told to stop (SIGUSR1)"),
        (signal.SIGUSR1, {0: 1}, 1, "rank 0 ended with status 1, after the run was told to stop (SIGUSR1)"),
        (signal.SIGINT, {1: -9}, 1, "rank 1 was killed by SIGKILL, after the run was told to stop (SIGINT)"),
        (signal.SIGUSR1, {}, 75, "no rank said why"),
        (None, {1: -9}, 1, "rank 1 was killed by SIGKILL (out of memory?)"),
        (None, {0: -6}, 1, "rank 0 was killed by SIGABRT"),
        (None, {}, 1, "no rank said why"),
    ],
)
def test_who_was_killed_and_whether_it_can_be_queued_again(
    asked_by: signal.Signals | None,
    ends: dict[int, int],
    status: int,
    told: str,
    failures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record_ends(ends)
    run = tmp_path / "run"
    assert conclude(1, tmp_path, ended_at_once=False, asked_by=asked_by, run=run) == status
    told_all = capsys.readouterr().err
    assert told in told_all
    if "first step" not in told:
        assert "stopped before" not in told_all
        assert f"no checkpoint was written yet in {run}" in told_all
        for step in (2, 10):
            (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
            (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").touch()
        conclude(1, tmp_path, ended_at_once=False, asked_by=asked_by, run=run)
        assert f"goes on: {run}/checkpoints/step-00000010\n" in capsys.readouterr().err


def test_echoes_of_a_killed_rank_are_no_failures_of_their_own(
    failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether another rank has told of its lost connection before torchrun ended it is chance."""
    record(monkeypatch, 0, ConnectionError("closed by peer"))
    record_ends({0: 1, 1: -9})
    assert conclude(1, tmp_path, ended_at_once=False, asked_by=signal.SIGUSR1) == 75
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:3] == ["rank 0 says:", "ConnectionError: closed by peer"]
    assert lines[-2] == "rank 1 was killed by SIGKILL, after the run was told to stop (SIGUSR1)"


@pytest.mark.parametrize("asked_by", [signal.SIGINT, signal.SIGUSR1, None])
def test_a_rank_that_had_no_room_to_say_that_it_was_stopped(
    asked_by: signal.Signals | None,
    failures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its status says so, as torchrun saw it; the request may have come to another machine."""

    def has_no_room(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", has_no_room)
    assert stop_status() == 75
    assert not was_stopped(failures)
    assert conclude(75, tmp_path, ended_at_once=False, asked_by=asked_by) == 75
    record_ends({0: 75, 1: -15})
    assert conclude(1, tmp_path, ended_at_once=False, asked_by=asked_by) == 75
    assert capsys.readouterr().err == ""
    record(monkeypatch, 1, RuntimeError("its own"))
    assert conclude(75, tmp_path, ended_at_once=False, asked_by=asked_by) == 1


def test_a_machine_that_knows_nothing_takes_what_ranks_of_others_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`srun` returns the highest status of all machines: 75 of this one would hide the error of that one."""
    here, there = tmp_path / "node-1", tmp_path / "node-0"
    for logs in (here, there):
        (logs / "failures").mkdir(parents=True)
        (logs / "torchrun.log").write_text("the rendezvous is gone\n")
    assert conclude(1, here, ended_at_once=False, asked_by=signal.SIGUSR1) == 75
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(there / "failures"))
    record(monkeypatch, 0, RuntimeError("its own"))
    capsys.readouterr()
    assert conclude(1, here, ended_at_once=False, asked_by=signal.SIGUSR1) == 1
    assert "rank 0 failed first:\nRuntimeError: its own\n" in capsys.readouterr().err
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(here / "failures"))
    record_ends({1: -9})
    assert conclude(1, here, ended_at_once=False, asked_by=signal.SIGUSR1) == 75, "what it knows itself goes first"


def test_a_full_disk_does_not_hide_how_a_rank_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", num_kib=64) as disk:
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(disk))
        assert stop_status() == 0
        assert was_stopped(disk)
        record_ends({1: -9})
        Ballast(disk).fill()
        assert not record_failure(RuntimeError("it is printed"))
        record_ends({0: 1, 1: -9, 2: -9})
        assert read_ends(disk) == {1: -9}
        assert json.loads((disk / ENDS_FILE).read_text()) == {"1": -9}
