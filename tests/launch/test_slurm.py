"""The batch script as text; tests/launch/test_slurm_jobs.py runs it in Slurm."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest

from perl_megatron.cli import main
from perl_megatron.config.load import load_config
from perl_megatron.launch.slurm import JobFiles, render, sbatch_options

POLICY = Path(__file__).resolve().parents[2] / "examples" / "qwen2_5_vl" / "7b"
HOSTILE = 'x\'; touch hit; $(touch hit) "`touch hit`"\n#SBATCH --uid=0\ntouch hit'


def script(*overrides: str, command: str = "train", resume: bool = False) -> str:
    config = load_config(None, ["model.path=m", "run.name=mine", *overrides]).config
    return render(config, JobFiles.of(config), command=command, resume=resume)


def sbatch_lines(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def arrays(text: str, *names: str) -> list[list[str]]:
    """What bash takes the variables for; everything before the first command of the script is run."""
    head = text.split("\nmapfile", maxsplit=1)[0]
    program = (
        head
        + "\n"
        + "".join(
            f'for value in ${{{name}[@]+"${{{name}[@]}}"}}; do printf "%s\\0" "$value"; done; printf "\\1\\0"\n'
            for name in names
        )
    )
    output = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
    return [part.removeprefix("\0").split("\0")[:-1] for part in output.split("\1")[:-1]]


def test_what_slurm_is_asked_for():
    text = script(
        *("parallel.data=16", "launch.nodes=2", "launch.gpus_per_node=8", "launch.cpus_per_node=64"),
        *("launch.partition=gpu", "launch.account=lab", "launch.qos=high", "launch.time=4:00:00"),
        *("launch.sbatch_options=[--exclusive, --constraint=h100]", "launch.grace_seconds=300"),
    )
    assert sbatch_lines(text) == [
        "--job-name=mine",
        '--output="runs/mine.slurm/job-%j.log"',
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--signal=B:USR1@330",
        "--requeue",
        "--partition=gpu",
        "--account=lab",
        "--qos=high",
        "--time=4:00:00",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--exclusive",
        "--constraint=h100",
    ]
    assert text.startswith("#!/bin/bash\n")
    assert arrays(text, "srun_options", "requeue") == [["--cpus-per-task=64"], ["1"]]
    once = script("launch.requeue=false", "launch.rollout_nodes=3", resume=True)
    assert {"--no-requeue", "--nodes=4"} < set(sbatch_lines(once))
    assert arrays(once, "resume", "requeue") == [["--resume"], [""]]


def test_containers():
    image = ("launch.container_image=/images/it's.sqsh", "launch.container_mounts=[/data, /a:/b]")
    here = str(Path.cwd())
    python, options = arrays(script("launch.container=pyxis", *image), "python", "srun_options")
    assert python == ["python"]
    assert options == [
        "--container-image=/images/it's.sqsh",
        f"--container-mounts={here}:{here},/data:/data,/a:/b",
        f"--container-workdir={here}",
    ]
    python, options = arrays(
        script("launch.container=apptainer", *image, "parallel.data=8", "launch.gpus_per_node=8", "launch.python=/py"),
        *("python", "srun_options"),
    )
    binds = ["--bind", here, "--bind", "/data", "--bind", "/a:/b"]
    assert python == ["apptainer", "exec", "--nv", *binds, "--pwd", here, "/images/it's.sqsh", "/py"]
    assert options == []


def test_no_value_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each that a shell sees; the rest stays in the config file."""
    setup = tmp_path / "it's $(touch hit)"
    setup.write_text("SEEN=yes python=mine $UNSET\n")
    monkeypatch.chdir(tmp_path)
    text = script(
        f"launch.setup_file={setup}",
        *("launch.container=apptainer", f"launch.container_image={HOSTILE}", f"launch.python={HOSTILE}"),
        *("run.directory=$(touch hit) `touch hit` it's", f"rollout.api_key_file={HOSTILE}", "launch.rollout_nodes=1"),
        *(f"data.system_prompt={HOSTILE}", f"launch.environment=[{json.dumps(f'VALUE={HOSTILE}')}]"),
    )
    python, run, key, seen, value = arrays(text, "python", "run", "api_key_file", "SEEN", "VALUE")
    assert python[-2:] == [HOSTILE, HOSTILE]
    assert run == ["./$(touch hit) `touch hit` it's/mine"]
    assert key == [f"./{HOSTILE}"]
    assert (seen, value) == (["yes"], [HOSTILE])
    assert [path.name for path in tmp_path.iterdir()] == [setup.name]
    # Slurm reads options up to the first line that is no comment.
    before_code = takewhile(lambda line: line.startswith("#") or not line, text.splitlines())
    options = sbatch_options(load_config(None, ["model.path=m"]).config, JobFiles(Path("x"), "t"))
    assert len([line for line in before_code if "SBATCH" in line]) == len(options)


@pytest.mark.parametrize(
    ("restarts", "is_behind", "command", "is_resumed"),
    [("", True, "train", True), ("", False, "train", False), ("1", False, "sft", True), ("1", False, "eval", False)],
)
def test_a_run_that_has_begun_is_resumed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarts: str,
    is_behind: bool,
    command: str,
    is_resumed: bool,
):
    """By a job that was queued again, and by one that waited for another job of the run."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "NodeName=a NodeAddr=a JobState=RUNNING"\n')
    for program in ("srun", "scontrol"):
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.chdir(tmp_path)
    variables = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "SLURM_RESTART_COUNT": restarts or "0"}
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for begun in (False, True):
        config = load_config(None, ["model.path=m", "run.name=mine"]).config
        text = render(config, JobFiles.of(config), command=command, resume=False, is_behind=is_behind)
        job = subprocess.run(["bash", "-c", text], env=os.environ | variables, capture_output=True, text=True)
        assert (job.returncode, job.stderr) == (0, "")
        assert (" --resume " in job.stdout) == (begun and is_resumed)
        (tmp_path / "runs" / "mine" / "config.yaml").touch()


def test_bash_reads_it():
    for overrides in ((), ("launch.rollout_nodes=2",)):
        subprocess.run(["bash", "-n"], input=script(*overrides), text=True, check=True)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings of one that can be submitted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: {POLICY}}}\ndata: {{train: d.jsonl}}\nrollout: {{engine: embedded}}\n"
    )
    (tmp_path / "d.jsonl").touch()
    return ["c.yaml", "parallel.data=2"]


def test_a_dry_run_prints_and_leaves_nothing(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(tmp_path.iterdir())
    assert main(["launch", "slurm", "--dry-run", *job]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    nodes = ["launch.nodes=2", "launch.endpoint=127.0.0.1:29500", "--node-rank", "1"]
    assert main(["launch", "torchrun", "--dry-run", *job, *nodes]) == 0
    printed = capsys.readouterr().out
    assert "--nnodes 2 --nproc-per-node 1 --rdzv-backend static" in printed
    assert "--master-addr 127.0.0.1 --master-port 29500 --node-rank 1" in printed
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["slurm"], "Slurm's `sbatch` is not here"),
        (["slurm", "launch.nodes=2", "launch.gpus_per_node=8"], "2 × 8 GPUs are not the 2 processes"),
        (["slurm", "--node-rank", "0"], "a Slurm job sets --node-rank itself"),
        (["slurm", "--resume"], "there is no run to resume"),
        (["slurm", "parallel.tensor=3"], "tensor-parallel size 3 does not divide"),
        (["torchrun", "launch.nodes=2"], "no place is set to meet at"),
        (["torchrun", "launch.nodes=2", "launch.endpoint=127.0.0.1:1"], "no rank of one of 2 machines"),
        (
            ["torchrun", "launch.nodes=2", "launch.endpoint=no.such.host.invalid:1", "--node-rank=0"],
            "there is no way to",
        ),
        (["torchrun", "--node-rank", "1"], "1 is not the rank of one of 1 machines"),
        (["torchrun", "--job", "eval", "evaluation.ask=endpoint"], "2 processes would ask the endpoint for the same"),
        (["torchrun", "--job", "eval", "--resume"], "an evaluation is not resumed"),
    ],
)
def test_what_cannot_be_launched_is_refused_and_leaves_nothing(
    job: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    before = sorted(tmp_path.iterdir())
    assert main(["launch", arguments[0], *job, *arguments[1:]]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
