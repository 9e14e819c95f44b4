"""How a rank tells the launcher why it failed, so that the first failure is what a person reads last."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from perl_megatron.errors import UserError, is_full_disk

DIRECTORY_VARIABLE = "PERL_MEGATRON_FAILURES"
EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
EXIT_STOPPED = 75
"""A run that was asked to stop before its last step (EX_TEMPFAIL of sysexits.h: start it again with --resume)."""
STOPPED_FILE = "stopped"
ENDS_FILE = "ends.json"
_told: list[BaseException | None] = [None]
"""The error of this process that the launcher has been told of."""


@dataclass(frozen=True)
class Failure:
    """Why one rank ended."""

    rank: int
    time: float
    """Seconds since the epoch."""
    user_error: bool
    text: str
    """The message of a UserError, else the traceback."""


def record_failure(error: BaseException) -> bool:
    """Tell the launcher about the error that ends this rank.

    False where it cannot be told (there is none, or the disk is full): then print it. An error that has been told is
    not told again: what counts is when it came.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None:
        return False
    if error is _told[-1]:
        return True
    user_error = isinstance(error, UserError)
    text = str(error) if user_error else "".join(traceback.format_exception(error))
    failure = Failure(rank=int(os.environ.get("RANK", "0")), time=time.time(), user_error=user_error, text=text)
    is_written = _write(Path(directory) / f"rank-{failure.rank}.json", json.dumps(asdict(failure)))
    _told[-1] = error if is_written else None
    return is_written


def stop_status() -> int:
    """The exit status of a rank whose run was stopped by request; the launcher, if there is one, is told.

    torchrun takes any status but 0 for a failure, so a launched rank ends with 0 and the launcher with EXIT_STOPPED.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None:
        return EXIT_STOPPED
    try:
        (Path(directory) / STOPPED_FILE).touch()
    except OSError as error:
        if not is_full_disk(error):
            raise
        return EXIT_STOPPED  # which torchrun passes on to the launcher (``agent``)
    return 0


def was_stopped(directory: Path) -> bool:
    """Whether a rank said that the run was stopped by request."""
    return (directory / STOPPED_FILE).exists()


def record_ends(exit_codes: Mapping[int, int]) -> None:
    """In torchrun: the exit code of each rank that failed; a negative one: it was killed by the signal of that number.

    Those that torchrun ended thereupon are not among them.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is not None and exit_codes:
        _write(Path(directory) / ENDS_FILE, json.dumps(dict(exit_codes)))


def read_ends(directory: Path) -> dict[int, int]:
    """Rank → exit code, as torchrun saw them; empty where it did not get to say so."""
    path = directory / ENDS_FILE
    if not path.exists():
        return {}
    return {int(rank): code for rank, code in json.loads(path.read_text(encoding="utf-8")).items()}


def _write(path: Path, text: str) -> bool:
    """Write a file whole; False where the disk is full."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        if not is_full_disk(error):
            raise
        return False
    return True


def first_failure(*directories: Path) -> Failure | None:
    """The earliest recorded failure. A mistake of the user goes before its echoes on other ranks."""
    paths = [path for directory in directories for path in directory.glob("rank-*.json")]
    failures = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return min(failures, key=lambda failure: (not failure.user_error, failure.time), default=None)
