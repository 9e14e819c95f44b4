"""How a rank tells the launcher why it failed, so that the first failure is what a person reads last."""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from perl_megatron.errors import UserError

DIRECTORY_VARIABLE = "PERL_MEGATRON_FAILURES"
EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
EXIT_STOPPED = 75
"""A run that was asked to stop before its last step (EX_TEMPFAIL of sysexits.h: start it again with --resume)."""
STOPPED_FILE = "stopped"


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
    """Tell the launcher about the error that ends this rank; False where no launcher listens (then print it)."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None:
        return False
    user_error = isinstance(error, UserError)
    text = str(error) if user_error else "".join(traceback.format_exception(error))
    failure = Failure(rank=int(os.environ.get("RANK", "0")), time=time.time(), user_error=user_error, text=text)
    path = Path(directory) / f"rank-{failure.rank}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    os.replace(temporary, path)
    return True


def stop_status() -> int:
    """The exit status of a rank whose run was stopped by request; the launcher, if there is one, is told.

    torchrun takes any status but 0 for a failure, so a launched rank ends with 0 and the launcher with EXIT_STOPPED.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None:
        return EXIT_STOPPED
    (Path(directory) / STOPPED_FILE).touch()
    return 0


def was_stopped(directory: Path) -> bool:
    """Whether a rank said that the run was stopped by request."""
    return (directory / STOPPED_FILE).exists()


def first_failure(directory: Path) -> Failure | None:
    """The earliest recorded failure. A mistake of the user goes before its echoes on other ranks."""
    failures = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in directory.glob("rank-*.json")]
    return min(failures, key=lambda failure: (not failure.user_error, failure.time), default=None)
