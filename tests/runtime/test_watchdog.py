"""A phase that takes too long ends the job within seconds, and every rank's stack is shown."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from plain_ranks import LONGEST, end_of, run_ranks, running_ranks

import perl_megatron
from perl_megatron.config.deadline_section import DeadlinesConfig
from perl_megatron.launch.failures import DIRECTORY_VARIABLE, first_failure
from perl_megatron.runtime.watchdog import BETWEEN

WORKER = Path(__file__).with_name("watchdog_worker.py")


def run_alone(how: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The worker as the only rank."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", **variables}
    command = [sys.executable, str(WORKER), how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST)


def test_every_deadline_is_that_of_a_phase_and_every_phase_has_one() -> None:
    source = "".join(path.read_text() for path in Path(perl_megatron.__file__).parent.glob("*.py"))
    phases = set(re.findall(r"phases?\(\"(\w+)\"", source))
    assert phases | {BETWEEN} == set(DeadlinesConfig().of_phases())


def test_a_rank_that_stalls_is_named_and_all_stacks_are_shown() -> None:
    results = run_ranks(WORKER, "sleeps")
    assert [result.returncode for result in results] == [1, 1, 1]
    reports = [result.stderr for result in results if "DeadlineError" in result.stderr]
    assert len(reports) == 1
    report = reports[0]
    assert "phase 'update' took longer than deadlines.update = 3 s" in report
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
    """As torchrun does, it is killed when the others have said so and ended."""
    with running_ranks(WORKER, "stopped") as ranks:
        results = [end_of(ranks[0]), end_of(ranks[2])]
        assert ranks[1].poll() is None
    assert [result.returncode for result in results] == [1, 1]
    assert ranks[1].returncode == -signal.SIGKILL
    report = next(result.stderr for result in results if "DeadlineError" in result.stderr)
    assert "ranks that the others wait for: 1\n" in report
    assert "rank 1: gives no answer" in report


def test_phases_that_end_in_time_leave_the_process_alone() -> None:
    """Though all of them take longer than one of them may, and are looked at all the time."""
    result = run_alone("in_time")
    assert result.returncode == 0, result.stderr
    assert "inner phases took long enough" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("how", ["alone", "between", "held"])
def test_one_process(how: str) -> None:
    """Also where the interpreter is held by a library: then by faulthandler, a little later."""
    result = run_alone(how)
    assert result.returncode == 1
    assert "in stall_here" in result.stderr
    phase = {"alone": "update", "between": "between"}.get(how)
    if phase is not None:
        assert f"phase '{phase}' took longer than deadlines.{phase} = 1 s (on rank 0)" in result.stderr
    else:
        assert "Timeout" in result.stderr


def test_the_launcher_is_told(tmp_path: Path) -> None:
    result = run_alone("alone", **{DIRECTORY_VARIABLE: str(tmp_path)})
    assert result.returncode == 1
    failure = first_failure(tmp_path)
    assert failure is not None
    assert not failure.user_error
    assert "phase 'update' took longer than deadlines.update = 1 s (on rank 0)" in failure.text
    assert "in stall_here" in failure.text
