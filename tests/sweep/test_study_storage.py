"""The study's file and database: stops of the disk and of their holders at the worst moments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError

from perl_megatron.sweep import journal, storage
from perl_megatron.sweep.journal import JournalWithHeartbeat
from perl_megatron.sweep.storage import Database

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the reader, in its first item."""
    now = [1000.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    return now


def open_journal(path: Path | str) -> tuple[JournalWithHeartbeat, optuna.Study]:
    opened = JournalWithHeartbeat(str(path), interval=60, grace=180)
    return opened, optuna.create_study(storage=opened, study_name="case", load_if_exists=True)


def test_the_lock_of_a_killed_worker_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the sweep's folder is given relative to the current directory, as its default is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    killed, _ = open_journal("sweeps/study.journal")
    other, study = open_journal("sweeps/study.journal")
    killed._backend._lock.acquire()
    other._backend._lock.grace_period = 1
    study.set_user_attr("written", True)
    assert open_journal("sweeps/study.journal")[1].user_attrs == {"written": True}


def test_a_worker_from_which_the_lock_was_taken_leaves_the_next_ones_alone(tmp_path: Path) -> None:
    """It stood still for longer than others wait."""
    locks = [open_journal(tmp_path / "study.journal")[0]._backend._lock for _ in range(2)]
    locks[0].acquire()
    locks[1].grace_period = 1
    locks[1].acquire()
    locks[0].release()
    assert (tmp_path / "study.journal.lock").is_symlink()
    locks[1].release()
    assert not (tmp_path / "study.journal.lock").is_symlink()


@pytest.mark.parametrize("begun", [b'{"op_code":4,"wor', b'{"long":"' + b"x" * 200_000])
def test_a_line_that_was_not_finished_does_not_spoil_the_study(tmp_path: Path, begun: bytes) -> None:
    _, study = open_journal(tmp_path / "study.journal")
    study.set_user_attr("first", 1)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(begun)
    _, again = open_journal(tmp_path / "study.journal")
    for name in ("second", "third"):
        again.set_user_attr(name, 1)
    assert open_journal(tmp_path / "study.journal")[1].user_attrs == {"first": 1, "second": 1, "third": 1}
    assert study.user_attrs == {"first": 1, "second": 1, "third": 1}


def test_workers_have_a_heartbeats_time_when_a_disk_goes_on(tmp_path: Path, clock: list[float]) -> None:
    opened, study = open_journal(tmp_path / "study.journal")
    alive, dead = (study.ask()._trial_id for _ in range(2))
    for trial in (alive, dead):
        opened.record_heartbeat(trial)
    silent = [opened._get_stale_trial_ids(study._study_id)]
    clock[0] += 200.0  # nobody could write; this reader is the first that goes on
    silent.append(opened._get_stale_trial_ids(study._study_id))
    opened.record_heartbeat(alive)
    clock[0] += 59.0
    silent.append(opened._get_stale_trial_ids(study._study_id))
    clock[0] += 2.0
    silent.append(opened._get_stale_trial_ids(study._study_id))
    assert silent == [[], [], [], [dead]]


def test_a_heartbeat_that_cannot_be_written_is_only_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, study = open_journal(tmp_path / "study.journal")
    trial = study.ask()._trial_id

    def full(logs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(opened._backend, "append_logs", full)
        opened.record_heartbeat(trial)
    opened.record_heartbeat(trial)
    study.tell(trial, state=TrialState.FAIL)
    opened.record_heartbeat(trial)  # it is another worker's
    assert study.get_trials()[0].system_attrs["heartbeat"] == 1


def test_a_database_that_is_away_or_stood_still(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Database(f"sqlite:///{tmp_path}/study.db", interval=60, grace=180)
    with monkeypatch.context() as patch:

        def away(*_: object) -> None:
            raise StorageInternalError

        patch.setattr(RDBStorage, "record_heartbeat", away)
        opened.record_heartbeat(0)
    silent = [7]
    monkeypatch.setattr(RDBStorage, "_get_stale_trial_ids", lambda *_: silent)
    assert opened._get_stale_trial_ids(0) == []
    clock[0] += 61.0
    assert opened._get_stale_trial_ids(0) == [7]
    silent = []
    assert opened._get_stale_trial_ids(0) == []
    silent = [7]
    assert opened._get_stale_trial_ids(0) == []


def test_two_sweeps_that_begin_in_a_new_database_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them finds half of the other's tables, and looks again."""
    url, made, pauses = f"sqlite:///{tmp_path}/study.db", RDBStorage.__init__, []

    def both(*arguments: Any, **options: Any) -> None:
        if not pauses:
            table = DBAPIError("CREATE TABLE studies", None, Exception("table studies already exists"))
            raise table
        made(*arguments, **options)

    monkeypatch.setattr(RDBStorage, "__init__", both)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    assert storage._open_database(url, interval=60, grace=180).get_heartbeat_interval() == 60
    assert pauses == [1.0]


def test_every_connection_to_a_database_has_the_same_time_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's times are UTC already; here it gets another setting that belongs to a connection."""
    monkeypatch.setitem(storage.SET_UTC, "sqlite", "PRAGMA cache_size = 777")
    opened = Database(f"sqlite:///{tmp_path}/study.db", interval=60, grace=180)
    for _ in range(2):
        with opened.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == 777
        opened.engine.dispose()
    assert {"postgresql", "mysql", "mariadb"} <= storage.SET_UTC.keys()
    assert os.path.exists(tmp_path / "study.db")
