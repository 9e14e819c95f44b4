"""The Slurm job array of a sweep: what bash and sbatch see of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from perl_megatron.errors import UserError
from perl_megatron.launch.sweep_array import render_array, submit


def render(tmp_path: Path, command: list[str], **options: object) -> str:
    given = {
        "workers": 3,
        "nodes": 2,
        "name": "case",
        "folder": tmp_path,
        "options": ("--partition=gpu",),
        "setup": None,
    }
    return render_array(command, **{**given, **options})  # type: ignore[arg-type]


def run(script: str, tmp_path: Path, state: str = "RUNNING") -> subprocess.Popen[str]:
    """The script in bash, with an `scontrol` that notes what it is asked, and knows the task's state."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'[ "$1" = requeue ] || echo "JobId=13 ArrayJobId=12 JobName=CANCELLED JobState={state} Reason=None"\n'
    )
    scontrol.chmod(0o755)
    (tmp_path / "script").write_text(script)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "1",
    }
    return subprocess.Popen(["bash", str(tmp_path / "script")], env=environment, stdout=subprocess.PIPE, text=True)


def test_nothing_of_the_config_is_read_by_the_shell(tmp_path: Path) -> None:
    words = ["printf", "%s\\n", "data.train=a b", "$(touch pwned)", "`id`", "x;y", "'q'", '"']
    process = run(render(tmp_path, words), tmp_path)
    output, _ = process.communicate(timeout=120)
    assert output.splitlines() == words[2:]
    assert process.returncode == 0
    assert not (tmp_path / "asked").exists()


SHOW = "--oneliner show job 12_1\n"


@pytest.mark.parametrize(("state", "asked"), [("RUNNING", SHOW + "requeue 12_1\n"), ("CANCELLED", SHOW)])
def test_a_worker_that_was_asked_to_stop_is_queued_again(tmp_path: Path, state: str, asked: str) -> None:
    """Slurm sends SIGTERM to the batch shell alone; the worker gets it, and may take its time. So does `scancel`."""
    worker = "trap 'sleep 1; exit 75' TERM; touch ready; while :; do sleep 0.1; done"
    process = run(render(tmp_path, ["sh", "-c", f"cd {tmp_path}; {worker}"]), tmp_path, state)
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert (tmp_path / "asked").read_text() == asked


def test_the_head_has_the_users_options(tmp_path: Path) -> None:
    lines = render(tmp_path, ["true"], setup=tmp_path / "my setup.sh").splitlines()
    assert "#SBATCH --array=0-2" in lines
    assert "#SBATCH --nodes=2 --ntasks-per-node=1" in lines
    assert "#SBATCH --partition=gpu" in lines
    assert f". '{tmp_path}/my setup.sh'" in lines


def test_it_is_given_to_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    script = tmp_path / "workers.sbatch"
    script.write_text("script")
    with pytest.raises(UserError, match="`sbatch` is not here"):
        submit(script)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\nread -r line\n[ "$line $*" = "script --parsable" ] && echo "12;cluster"\n')
    sbatch.chmod(0o755)
    assert submit(script) == 12
    sbatch.write_text("#!/bin/sh\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(UserError, match="invalid partition") as error:
        submit(script)
    assert "slurm.options" in (error.value.fix or "")
