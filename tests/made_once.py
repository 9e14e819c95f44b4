"""What is costly to make is made once for all processes of a test run, also where pytest-xdist has several."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills; whoever comes first makes it, the others wait, and fail where it failed.

    Args:
        factory: its temporary folder lies beside those of the other processes.
        name: of the folder, unique in the whole run.
        make: gets the empty folder.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            assert not any(folder.iterdir()), f"{folder} could not be made before"
            make(folder)
            done.touch()
    return folder
