"""Where Optuna keeps the study, with heartbeats; and the queue: trials of silent workers fail, and are put back."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from perl_megatron.config.storage_url import without_password
from perl_megatron.config.sweep_file import Sweep
from perl_megatron.errors import UserError
from perl_megatron.sweep.journal import Confirmed, JournalWithHeartbeat

JOURNAL_NAME = "study.journal"
SQLITE_TIMEOUT = 60.0
"""Seconds that a worker waits for another one's transaction."""
TABLE_TRIES = 5
"""How often, a second apart, tables are looked for that another sweep is making."""
PREEMPTED = "preempted"
"""User attribute of a trial: how often its point's workers were asked to stop in the middle of it."""
REFUSED = "refused"
"""User attribute of a trial: its run cannot be done, and would fail again."""


SET_UTC = {
    "postgresql": "SET TIME ZONE 'UTC'",
    "mysql": "SET time_zone = '+00:00'",
    "mariadb": "SET time_zone = '+00:00'",
}
"""Optuna's heartbeats are local times of the database's session. Without this all of them look an hour late when summer
time begins, and those of sessions in different time zones always do."""


class Database(RDBStorage):
    """Optuna's, with heartbeats that survive a database which is away for a while."""

    def __init__(self, url: str, *, interval: int, grace: int):
        is_sqlite = url.startswith("sqlite:")
        arguments = {"connect_args": {"timeout": SQLITE_TIMEOUT}} if is_sqlite else {"pool_pre_ping": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(url, engine_kwargs=arguments, heartbeat_interval=interval, grace_period=grace)
        self._confirmed = Confirmed(interval)
        statement = SET_UTC.get(self.engine.dialect.name)
        if statement is not None:
            sqlalchemy.event.listen(self.engine, "connect", lambda connection, _: _execute(connection, statement))
            self.engine.dispose()  # the connections that were made without it

    def record_heartbeat(self, trial_id: int) -> None:
        """One that the database does not take is left out: the next one may get there."""
        with contextlib.suppress(StorageInternalError):
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        return self._confirmed.of(super()._get_stale_trial_ids(study_id))


def _execute(connection: Any, statement: str) -> None:
    """On a connection of the database's driver (PEP 249)."""
    cursor = connection.cursor()
    cursor.execute(statement)
    cursor.close()
    connection.commit()


def open_storage(sweep: Sweep) -> Database | JournalWithHeartbeat:
    """The storage of the study; made where it is not there. UserError where it cannot be opened."""
    workers, url = sweep.workers, sweep.sweep.storage
    if url is None or "://" not in url:
        path = sweep.folder / JOURNAL_NAME if url is None else url
        return JournalWithHeartbeat(str(path), interval=workers.heartbeat, grace=workers.grace)
    try:
        return _open_database(url, interval=workers.heartbeat, grace=workers.grace)
    except Exception as error:  # of SQLAlchemy, of the database's driver, or its absence
        raise UserError(
            f"the study's storage cannot be opened: {without_password(str(error))}",
            where=f"{sweep.places['sweep.storage']}: sweep.storage",
            fix="check the URL and the server; each kind of database needs its driver, such as psycopg2-binary",
        ) from error


@contextlib.contextmanager
def storage_failures(sweep: Sweep) -> Iterator[None]:
    """UserError where the storage does not do within the block what it is asked for: it is away, locked, or full."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = without_password(str(error.__cause__ or error)).splitlines()[0]
        raise UserError(
            f"the study's storage failed: {cause}",
            where=f"{sweep.places.get('sweep.storage', sweep.path)}: sweep.storage",
            fix=f"see to it and go on: {sweep.command()} (no point is lost, and runs go on from their checkpoints)",
        ) from error


def _open_database(url: str, *, interval: int, grace: int) -> Database:
    """Once more where another sweep made the tables at the same time: a database has one set of them for all."""
    for _ in range(TABLE_TRIES):
        try:
            return Database(url, interval=interval, grace=grace)
        except DBAPIError as error:
            if "already exists" not in str(error):
                raise
        time.sleep(1.0)
    return Database(url, interval=interval, grace=grace)


def unfinished_points(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Point → its last trial, where that one failed: nobody is at work on it, and nothing is in the queue."""
    last = {point_of(trial): trial for trial in study.get_trials(deepcopy=False)}  # of a point, the later trials last
    return {point: trial for point, trial in last.items() if trial.state == TrialState.FAIL}


def may_go_on(trial: FrozenTrial, retries: int) -> bool:
    """Whether a failed trial's point is to be taken up again; preemptions do not count."""
    ended = len(trial.system_attrs.get("retry_history", ())) + 1 - trial.user_attrs.get(PREEMPTED, 0)
    return not trial.user_attrs.get(REFUSED, False) and ended <= retries


def put_back(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enqueue a trial that repeats this one: the same point, with the same values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        RetryHeartbeatStaleTrialCallback()(study, trial)


def put_back_unfinished(study: optuna.Study, retries: int) -> None:
    """Enqueue all that may go on. Only who holds the lock of the queue calls this, so that nothing is enqueued twice.

    What is done follows from the study alone: a worker that dies between a failure and this leaves it to the next one.
    """
    for trial in unfinished_points(study).values():
        if may_go_on(trial, retries):
            put_back(study, trial)


def point_of(trial: FrozenTrial) -> int:
    """The number of the trial that this one repeats, or its own: one number for each point."""
    return trial.system_attrs.get("failed_trial", trial.number)
