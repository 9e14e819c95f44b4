"""The lock of a run's folder, between processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perl_megatron.errors import UserError
from perl_megatron.observability.run_lock import RunLock

HOLDER = """
import os, sys, time
from pathlib import Path
from perl_megatron.observability.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    time.sleep(600)  # a worker that outlives its parent
    os._exit(0)
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """By another process, which has a child."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            os.killpg(process.pid, 9)


def test_a_second_job_is_told_who_has_the_folder(tmp_path: Path) -> None:
    with held(tmp_path / "lock") as process:
        with pytest.raises(UserError, match=f"another job trains this run: process {process.pid} on "):
            RunLock(tmp_path / "lock").acquire(0)
        process.kill()
        process.wait()
        lock = RunLock(tmp_path / "lock")  # its child lives on, and does not have it
        lock.acquire(0)
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
        lock.release()


def test_a_job_that_ends_soon_is_waited_for(tmp_path: Path) -> None:
    with held(tmp_path / "lock") as process:
        ended = threading.Event()

        def end() -> None:
            ended.set()
            process.kill()

        ending = threading.Timer(1.0, end)
        ending.start()
        lock = RunLock(tmp_path / "lock")
        lock.acquire(120)
        assert ended.is_set()
        ending.join()
        lock.acquire(0)  # it has it
        lock.release()


def test_a_full_disk_does_not_keep_a_job_from_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    lock = RunLock(tmp_path / "lock")
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fail)
        lock.acquire(0)
    script = "import sys; from pathlib import Path; from perl_megatron.observability.run_lock import RunLock"
    take = [sys.executable, "-c", f"{script}; RunLock(Path(sys.argv[1])).acquire(0)", str(tmp_path / "lock")]
    assert subprocess.run(take, stderr=subprocess.DEVNULL, check=False).returncode == 1
    lock.release()
    assert subprocess.run(take, check=False).returncode == 0
