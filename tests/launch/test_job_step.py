"""How a run of several machines is started inside of a Slurm job; tests/end_to_end/test_slurm_run.py does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from perl_megatron.config.load import load_config
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.launch.job_step import JobStep


def config(*overrides: str) -> Config:
    return load_config(None, ["model.path=m", "parallel.data=4", *overrides]).config


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of three machines, and the `scontrol` that knows them."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '"show hostnames gpu[07-09]") echo gpu07; echo gpu08; echo gpu09;;\n'
        '"--oneliner show node gpu07") echo "NodeName=gpu07 NodeAddr=10.0.0.7 NodeHostName=gpu07";;\n'
        "*) echo unknown >&2; exit 1;; esac\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for name, value in (("JOB_ID", "120042"), ("JOB_NUM_NODES", "3"), ("JOB_NODELIST", "gpu[07-09]")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    return scontrol


def test_torchrun_is_started_on_each_machine(slurm: Path) -> None:
    step = JobStep.of(config("launch.nodes=2", "launch.cpus_per_node=8", "launch.python=/a b/python"))
    assert step is not None
    command = step.train_command(["c.yaml", "--resume", "launch.endpoint=elsewhere:1"], Path("a/seed-0.stop"))
    assert command == [
        *("srun", "--cpus-per-task=8", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--relative=0"),
        *("--export=ALL", "--kill-on-bad-exit=0", "--wait=300"),
        *("/a b/python", "-m", "perl_megatron", "launch", "torchrun"),
        *("--job", "train", "--stop-file", "a/seed-0.stop", "c.yaml", "--resume", "launch.endpoint=elsewhere:1"),
        *("launch.rendezvous=static", "launch.endpoint=10.0.0.7:20042"),
    ]


def test_runs_of_one_machine_and_those_outside_of_slurm_have_none(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert JobStep.of(config()) is None
    with pytest.raises(UserError, match="Slurm job 120042 has 3 machines"):
        JobStep.of(config("launch.nodes=4"))
    slurm.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(UserError, match="Slurm does not answer: Unable to contact"):
        JobStep.of(config("launch.nodes=2"))
    monkeypatch.delenv("SLURM_JOB_ID")
    assert JobStep.of(config("launch.nodes=2")) is None
