"""The launch commands at the head of the shipped configs make a job each."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from perl_megatron.cli import main

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "examples" / "qwen2_5_vl").glob("*.yaml"))
COMMANDS = [
    command
    for config in CONFIGS
    for command in re.findall(r"perl-megatron (launch (?:[^\\\n)]|\\\n#)+)", config.read_text())
]


def test_the_large_ones_have_a_command_each():
    assert len([command for command in COMMANDS if "launch slurm" in command]) == 5
    assert len([command for command in COMMANDS if "launch torchrun" in command]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_it_says_what_would_run(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(REPOSITORY)
    # What stands in a comment beside the command, and what every user has to fill in.
    words = shlex.split(
        re.sub(r"\\\n#|\s\(or.*", " ", command).replace("HOST", "127.0.0.1").replace("-rank N", "-rank 1")
    )
    (tmp_path / "train.jsonl").touch()
    folder = words[2].removesuffix(".yaml").removesuffix("_servers")
    data = [f"data.train={tmp_path}/train.jsonl", "data.evaluation=null"]
    assert main([*words, f"model.path={folder}", *data, f"run.directory={tmp_path}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    if words[1] == "torchrun":
        assert "--nproc-per-node 8" in printed
    else:
        assert "#SBATCH --gpus-per-node=8" in printed
        subprocess.run(["bash", "-n"], input=printed, text=True, check=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "train.jsonl"]
