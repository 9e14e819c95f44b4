"""Where Optuna keeps the study, with heartbeats; and the queue: a trial whose worker is silent fails, and is put back.

Databases have Optuna's own heartbeat. Its journal file has none; here it gets one through Optuna's own interface, so
that `study.optimize` treats both alike.
"""

from __future__ import annotations

import time
import warnings

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from perl_megatron.config.sweep_file import Sweep
from perl_megatron.errors import UserError

JOURNAL_NAME = "study.journal"
SQLITE_TIMEOUT = 60.0
"""Seconds that a worker waits for another one's transaction."""
PREEMPTED = "preempted"
"""User attribute of a trial: how often its point's workers were asked to stop in the middle of it."""
REFUSED = "refused"
"""User attribute of a trial: its run cannot be done, and would fail again."""


class JournalWithHeartbeat(JournalStorage, BaseHeartbeat):
    """A journal file in which running trials count their heartbeats.

    No clocks are compared: a trial is silent if its count has stayed the same for ``grace`` seconds of the reader's own
    clock. So a worker that has just started needs that long to find it.
    """

    _KEY = "heartbeat"

    def __init__(self, path: str, *, interval: int, grace: int):
        super().__init__(JournalFileBackend(path))
        self._interval, self._grace = interval, grace
        self._seen: dict[int, tuple[int, float]] = {}
        """Running trial → its count, and when this reader saw it first."""

    def record_heartbeat(self, trial_id: int) -> None:
        """Count on, unless another worker has taken the trial away, which this one will notice by itself."""
        count = self.get_trial(trial_id).system_attrs.get(self._KEY, 0)
        try:
            self.set_trial_system_attr(trial_id, self._KEY, count + 1)
        except UpdateFinishedTrialError:
            return

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        now = time.monotonic()
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        counts = {trial._trial_id: trial.system_attrs.get(self._KEY, 0) for trial in running}
        before = self._seen
        self._seen = {
            number: before[number] if number in before and before[number][0] == count else (count, now)
            for number, count in counts.items()
        }
        return [number for number, (_, since) in self._seen.items() if now - since > self._grace]

    def get_heartbeat_interval(self) -> int | None:
        """Seconds."""
        return self._interval

    def get_heartbeat_stale_trial_callback(self) -> None:
        """None: silent trials fail, and ``put_back_unfinished`` does the rest."""


def open_storage(sweep: Sweep) -> RDBStorage | JournalWithHeartbeat:
    """The storage of the study; made where it is not there. UserError where it cannot be opened."""
    workers, url = sweep.workers, sweep.sweep.storage
    if url is None or "://" not in url:
        path = sweep.folder / JOURNAL_NAME if url is None else url
        return JournalWithHeartbeat(str(path), interval=workers.heartbeat, grace=workers.grace)
    arguments = {"connect_args": {"timeout": SQLITE_TIMEOUT}} if url.startswith("sqlite:") else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return RDBStorage(
                url,
                engine_kwargs=arguments,
                heartbeat_interval=workers.heartbeat,
                grace_period=workers.grace,
            )
    except Exception as error:  # of SQLAlchemy, of the database's driver, or its absence
        raise UserError(
            f"the study's storage cannot be opened: {error}",
            where=f"{sweep.places['sweep.storage']}: sweep.storage",
            fix="check the URL and the server; each kind of database needs its driver, such as psycopg2-binary",
        ) from error


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
