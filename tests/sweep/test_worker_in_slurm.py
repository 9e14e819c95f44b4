"""A worker in a Slurm job, with runs of several machines; the job is a stand-in, and no run gets to its first step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from optuna.trial import TrialState
from slurm_job_case import JobAround
from sweep_case import SweepCase, make_case

from perl_megatron.errors import UserError
from perl_megatron.launch import job_step
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.sweep.command import SweepOptions, run
from perl_megatron.sweep.storage import REFUSED
from perl_megatron.sweep.trial_run import TrialRun
from perl_megatron.sweep.worker import FAILURE, Worker

GRID = """
  sampler: grid
  overrides: [parallel.data=12, launch.nodes={nodes}]
workers: {{heartbeat: 1, grace: 3, retries: 2}}
space:
  optimizer.learning_rate: [1.0e-5, 1.0e-4]
"""

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat")


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobAround:
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "bin").mkdir()
    return JobAround(tmp_path / "bin", monkeypatch)


def work(case: SweepCase) -> int:
    with StopRequest() as stop:
        return Worker(case.sweep, stop).work()


def test_a_run_of_too_many_machines_is_refused_once(
    around: JobAround, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker goes on, and nobody tries the point again."""
    case = make_case(tmp_path, GRID.format(nodes=4))
    assert work(case) == 1
    assert capsys.readouterr().out.count("failed for good. Slurm job 120042 has 3 machines") == 2
    trials = case.study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.FAIL]
    for trial in trials:
        assert trial.user_attrs[REFUSED] is True
        assert "launch.nodes = 4" in trial.user_attrs[FAILURE]


def test_slurm_is_asked_when_the_worker_starts_and_not_for_each_run(
    around: JobAround, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its controller is away at first, and when the runs begin."""
    case = make_case(tmp_path, GRID.format(nodes=2))
    commands: list[list[str]] = []
    command = TrialRun.command

    def noted(run: TrialRun) -> list[str]:
        around.is_away(questions=1000)
        commands.append(command(run))
        return ["sh", "-c", "echo refused; exit 2"]

    monkeypatch.setattr(TrialRun, "command", noted)
    monkeypatch.setattr(job_step, "ANSWER_SECONDS", 60.0)
    around.is_away(questions=2)
    assert work(case) == 1
    assert ["launch.endpoint=10.0.0.7:20042" in words for words in commands] == [True, True]


def test_no_trial_is_taken_while_slurm_does_not_answer(
    around: JobAround, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path, GRID.format(nodes=2))
    around.is_away(questions=1000)
    with pytest.raises(UserError, match="Slurm does not answer"):
        work(case)
    monkeypatch.setattr(job_step, "ANSWER_SECONDS", 60.0)
    with StopRequest() as stop:  # and a worker that waits for it can be told to go
        worker = Worker(case.sweep, stop)
        os.kill(os.getpid(), signal.SIGTERM)
        assert worker.work() == 75
    assert [trial.state for trial in case.study.get_trials()] == [TrialState.WAITING, TrialState.WAITING]


def test_runs_of_one_machine_do_not_need_slurms_answer(
    around: JobAround, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path, GRID.format(nodes=1))
    around.is_away(questions=1000)
    monkeypatch.setattr(TrialRun, "command", lambda run: ["sh", "-c", "exit 2"])
    assert work(case) == 1


def test_several_workers_would_share_the_machines_of_one_job(
    around: JobAround, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "perl_megatron.sweep.command.run_workers", lambda *_, workers, **__: calls.append(workers) or [0]
    )
    case = make_case(tmp_path, GRID.format(nodes=2))
    with pytest.raises(UserError, match="on the same machines of this Slurm job") as error:
        run(SweepOptions(case.path, (), workers=2))
    assert "--slurm 2" in (error.value.fix or "")
    assert not case.sweep.folder.exists()
    run(SweepOptions(case.path, (), workers=1))
    run(SweepOptions(case.path, ("sweep.overrides=[parallel.data=12]",), workers=2, dry_run=True))
    monkeypatch.delenv("SLURM_JOB_ID")
    run(SweepOptions(case.path, (), workers=2))
    assert calls == [1, 2]
