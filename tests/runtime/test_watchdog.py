"""A phase that takes too long ends the job within seconds, and every rank's stack is shown."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_agreement import run_ranks

import perl_megatron
from perl_megatron.config.deadline_section import DeadlinesConfig
from perl_megatron.launch.failures import DIRECTORY_VARIABLE, first_failure
from perl_megatron.runtime.watchdog import BETWEEN, Watchdog

WORKER = Path(__file__).with_name("watchdog_worker.py")


def test_every_deadline_is_that_of_a_phase_and_every_phase_has_one() -> None:
    source = "".join(path.read_text() for path in Path(perl_megatron.__file__).parent.glob("*.py"))
    phases = set(re.findall(r"phases?\(\"(\w+)\"", source))
    assert phases | {BETWEEN} == set(DeadlinesConfig().of_phases())


def test_a_rank_that_stalls_is_named_and_all_stacks_are_shown() -> None:
    start = time.monotonic()
    results = run_ranks(WORKER, "sleeps")
    assert time.monotonic() - start < 60
    assert [result.returncode for result in results] == [1, 1, 1]
    reports = [result.stderr for result in results if "DeadlineError" in result.stderr]
    assert len(reports) == 1
    report = reports[0]
    assert "phase 'update' took longer than deadlines.update = 1 s" in report
    assert "ranks that the others wait for: 1\n" in report
    assert "rank 0: in phase 'update'" in report
    assert "rank 2: in phase 'update'" in report
    assert report.count("waiting for other ranks") == 2
    assert "in stall_here" in report
    assert report.count("all_reduce") >= 2


def test_a_rank_that_never_came_is_named() -> None:
    results = run_ranks(WORKER, "elsewhere")
    assert [result.returncode for result in results] == [1, 1, 1]
    report = next(result.stderr for result in results if "DeadlineError" in result.stderr)
    assert "ranks that the others wait for: 1\n" in report
    assert "rank 1: between phases, after 'generate'" in report


def test_a_rank_that_is_stopped_gives_no_answer() -> None:
    results = run_ranks(WORKER, "stopped")
    assert [result.returncode for result in results] == [1, -signal.SIGKILL, 1]
    report = next(result.stderr for result in results if "DeadlineError" in result.stderr)
    assert "ranks that the others wait for: 1\n" in report
    assert "rank 1: gives no answer" in report


def test_phases_that_end_in_time_leave_the_process_alone() -> None:
    with Watchdog({"outer": 1.5, "inner": 0.2}, rank=0, world_size=1) as watchdog, watchdog.phase("outer"):
        for _ in range(4):
            with watchdog.phase("inner"):
                time.sleep(0.01)
    time.sleep(1.0)


@pytest.mark.parametrize("how", ["alone", "between", "held"])
def test_one_process(how: str) -> None:
    """Also where the interpreter is held by a library: then by faulthandler, a little later."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    result = subprocess.run(
        [sys.executable, str(WORKER), how], env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 1
    assert "in stall_here" in result.stderr
    phase = {"alone": "update", "between": "between"}.get(how)
    if phase is not None:
        assert f"phase '{phase}' took longer than deadlines.{phase} = 1 s (on rank 0)" in result.stderr
    else:
        assert "Timeout" in result.stderr


def test_the_launcher_is_told(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", DIRECTORY_VARIABLE: str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(WORKER), "alone"], env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 1
    failure = first_failure(tmp_path)
    assert failure is not None
    assert not failure.user_error
    assert "phase 'update' took longer than deadlines.update = 1 s (on rank 0)" in failure.text
    assert "in stall_here" in failure.text
