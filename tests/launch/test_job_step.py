"""How a run of several machines is started inside of a Slurm job; tests/end_to_end/test_slurm_run.py does it."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_job_case import JobAround

from perl_megatron.config.load import load_config
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.launch import job_step
from perl_megatron.launch.job_step import JobStep, SlurmJob


def config(*overrides: str) -> Config:
    return load_config(None, ["model.path=m", "parallel.data=4", *overrides]).config


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobAround:
    return JobAround(tmp_path, monkeypatch)


def test_torchrun_is_started_on_each_machine(around: JobAround) -> None:
    job = SlurmJob.around(lambda: None)
    step = JobStep.of(config("launch.nodes=2", "launch.cpus_per_node=8", "launch.python=/a b/python"), job)
    assert step is not None
    command = step.train_command(["c.yaml", "--resume", "launch.endpoint=elsewhere:1"], Path("a/seed-0.stop"))
    assert command == [
        *("srun", "--cpus-per-task=8", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--relative=0"),
        *("--export=ALL", "--kill-on-bad-exit=0", "--wait=300"),
        *("/a b/python", "-m", "perl_megatron", "launch", "torchrun"),
        *("--job", "train", "--stop-file", "a/seed-0.stop", "c.yaml", "--resume", "launch.endpoint=elsewhere:1"),
        *("launch.rendezvous=static", "launch.endpoint=10.0.0.7:20042"),
    ]


def test_runs_of_one_machine_and_those_outside_of_slurm_have_none(
    around: JobAround, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = SlurmJob("120042", 3, "10.0.0.7:20042")
    assert JobStep.of(config(), job) is None
    with pytest.raises(UserError, match="Slurm job 120042 has 3 machines"):
        JobStep.of(config("launch.nodes=4"), job)
    assert SlurmJob.is_here()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not SlurmJob.is_here()
    assert JobStep.of(config("launch.nodes=2"), None) is None


def test_slurm_is_asked_again_while_it_does_not_answer(around: JobAround, monkeypatch: pytest.MonkeyPatch) -> None:
    around.is_away(questions=2)
    waits: list[None] = []
    monkeypatch.setattr(job_step, "ANSWER_SECONDS", 60.0)
    assert SlurmJob.around(lambda: waits.append(None)) == SlurmJob("120042", 3, "10.0.0.7:20042")
    assert len(waits) == 2
    monkeypatch.setattr(job_step, "ANSWER_SECONDS", 0.2)
    around.is_away(questions=1000)
    with pytest.raises(UserError, match="Slurm does not answer: Unable to contact"):
        SlurmJob.around(lambda: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"Slurm cannot be asked: .*scontrol"):
        SlurmJob.around(lambda: None)
