"""One run of a trial, without a sweep (with one: test_sweep_command.py and test_sweep_workers_queue.py)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from perl_megatron.sweep import trial_run
from perl_megatron.sweep.file_lock import FileLock
from perl_megatron.sweep.trial_run import TrialRun

LAUNCHER = """
import pathlib, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(rank.pid))
time.sleep(600)
"""


def test_when_a_run_is_killed_its_ranks_are_gone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where they need a while: here, until they are looked at for the third time."""
    lock = FileLock(tmp_path / "run.lock")
    assert lock.try_acquire()
    run = TrialRun(Path("unused"), (), tmp_path / "seed-0", lock=lock.descriptor)
    note = tmp_path / "rank"
    monkeypatch.setattr(run, "command", lambda: [sys.executable, "-c", LAUNCHER, str(note)])
    run.start()
    while not (note.exists() and note.read_text()):
        assert run.is_running()
        time.sleep(0.01)
    rank = psutil.Process(int(note.read_text()))
    looks, kill, lives = [], psutil.Process.kill, trial_run._lives

    def looked_at(process: psutil.Process) -> bool:
        if process == rank:
            looks.append(process)
            if len(looks) == 3:
                kill(rank)
        return lives(process)

    monkeypatch.setattr(trial_run, "_lives", looked_at)
    monkeypatch.setattr(psutil.Process, "kill", lambda process: None if process == rank else kill(process))
    run.kill()
    assert len(looks) >= 3
    assert not lives(rank)
    lock.close()
