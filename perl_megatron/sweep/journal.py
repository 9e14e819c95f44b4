"""The study as a journal file: with heartbeats, and safe from writers that stop in the middle of a line.

Optuna's journal has no heartbeat; here it gets one through Optuna's own interface, so that `study.optimize` treats file
and database alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from optuna.trial import TrialState


class Confirmed:
    """Of trials that are silent those that were so at an earlier look too, at least a heartbeat ago.

    When a disk or database goes on that stood still, or a reader that was stopped, all trials look silent to the first
    one that looks. So workers that are alive get the time of one heartbeat to say so.
    """

    def __init__(self, interval: float):
        self._interval = interval
        self._since: dict[int, float] = {}

    def of(self, silent: Iterable[int]) -> list[int]:
        """``silent``: ids of the trials that are, at this look."""
        now = time.monotonic()
        self._since = {trial: self._since.get(trial, now) for trial in silent}
        return [trial for trial, since in self._since.items() if now - since > self._interval]


class JournalWithHeartbeat(JournalStorage, BaseHeartbeat):
    """A journal file in which running trials count their heartbeats.

    No clocks are compared: a trial is silent if its count has stayed the same for ``grace`` seconds of the reader's own
    clock. So a worker that has just started needs that long to find it.
    """

    _KEY = "heartbeat"

    def __init__(self, path: str, *, interval: int, grace: int):
        super().__init__(_Journal(path))
        self._interval, self._grace = interval, grace
        self._seen: dict[int, tuple[int, float]] = {}
        """Running trial → its count, and when this reader saw it first."""
        self._confirmed = Confirmed(interval)

    def record_heartbeat(self, trial_id: int) -> None:
        """Count on, unless another worker has taken the trial away, which this one will notice by itself.

        A heartbeat that the disk refuses is left out: the next one may be written.
        """
        with contextlib.suppress(UpdateFinishedTrialError, OSError):
            count = self.get_trial(trial_id).system_attrs.get(self._KEY, 0)
            self.set_trial_system_attr(trial_id, self._KEY, count + 1)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        now = time.monotonic()
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        counts = {trial._trial_id: trial.system_attrs.get(self._KEY, 0) for trial in running}
        before = self._seen
        self._seen = {
            number: before[number] if number in before and before[number][0] == count else (count, now)
            for number, count in counts.items()
        }
        return self._confirmed.of(number for number, (_, since) in self._seen.items() if now - since > self._grace)

    def get_heartbeat_interval(self) -> int | None:
        """Seconds."""
        return self._interval

    def get_heartbeat_stale_trial_callback(self) -> None:
        """None: silent trials fail, and ``put_back_unfinished`` does the rest."""


class _Journal(JournalFileBackend):
    """Optuna's file. A line that its writer did not finish (a full disk, a machine that went down) is cut off by the
    next one, which would otherwise go on in it, and nobody could read the file any more."""

    def __init__(self, path: str):
        # Optuna's lock is a link to the file, and by its own path it finds it from the current directory only: a lock
        # that a killed worker left would never be taken away.
        path = os.path.abspath(path)
        super().__init__(path, lock_obj=_JournalLock(path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """A line of JSON for each."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with get_lock_file(self._lock):
            _cut_unfinished_line(Path(self._file_path))
            with open(self._file_path, "ab") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())


class _JournalLock(JournalFileSymlinkLock):
    """Optuna's, which others take from a holder after 30 seconds: the disk stands still, or the holder does.

    Such a holder goes on when it can: its line was appended all the same. The lock that is there now is another one's.
    """

    _own: tuple[int, int] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        super().acquire()  # calls `release` to take it from another one
        self._own = self._identity()
        return True

    def release(self) -> None:
        """Remove the lock: one's own if it is still there, or else that of a holder from which it is taken."""
        own, self._own = self._own, None
        if own is None:
            super().release()
        elif own == self._identity():
            with contextlib.suppress(RuntimeError):  # taken just now
                super().release()

    def _identity(self) -> tuple[int, int]:
        try:
            status = os.lstat(self._lock_file)
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns


def _cut_unfinished_line(path: Path) -> None:
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        while end > 0:
            begin = max(0, end - 65536)
            file.seek(begin)
            last = file.read(end - begin).rfind(b"\n")
            end = begin if last < 0 else begin + last + 1
            if last >= 0:
                break
        file.truncate(end)
