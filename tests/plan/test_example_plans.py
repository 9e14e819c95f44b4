"""Every shipped config of the published sizes fits its devices by `perl-megatron plan`, and wastes nothing it names."""

import json
import re
import shlex
from pathlib import Path

import pytest

from perl_megatron.cli import main

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
CONFIGS = sorted((EXAMPLES / "qwen2_5_vl").glob("*.yaml"))
MAX_LINES = 40
COMMANDS = [
    # What stands in a comment beside the command.
    shlex.split(re.sub(r"\\\n#|\s\(or.*", " ", command))
    for file in sorted(EXAMPLES.rglob("*"))
    if file.is_file()
    for command in re.findall(
        r"^#.*perl-megatron ((?:plan|launch slurm) (?:[^\\\n]|\\\n#)+)", file.read_text(), re.MULTILINE
    )
]
"""At the head of the files; ``tests/launch/test_example_jobs.py`` starts those of `launch` without running them."""


def plan(capsys, config: Path, *options: str) -> tuple[int, dict]:
    size = config.stem.split("_")[0]
    arguments = [str(config), f"model.path={config.parent / size}", "--gpu", "h100-80g", "--json", *options]
    status = main(["plan", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_they_cover_what_users_have():
    assert [config.stem for config in CONFIGS] == sorted(
        ["3b_one_gpu", "3b", "7b", "7b_servers", "32b", "32b_servers", "72b", "72b_servers"]
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_they_fit(capsys, config):
    status, found = plan(capsys, config)
    assert status == 0
    assert found["fits"]
    assert [remark["name"] for remark in found["remarks"] if remark["level"] != "note"] == []
    sizes = {"3b": 8, "7b": 8, "32b": 32, "72b": 64, "3b_one_gpu": 1}
    assert found["layout"]["world_size"] == sizes[config.stem.removesuffix("_servers")]
    assert (found["layout"]["engine"] == "server") == config.stem.endswith("_servers")


def test_each_has_its_commands():
    assert [words[1] for words in COMMANDS if words[0] == "plan"] == [
        str(config.relative_to(REPOSITORY)) for config in CONFIGS
    ]
    assert len([words for words in COMMANDS if words[0] == "launch"]) == 5


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "plan"], ids=lambda words: words[1])
def test_the_plan_at_its_head_is_as_it_stands_there(monkeypatch, capsys, words):
    monkeypatch.chdir(REPOSITORY)
    assert main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "launch"], ids=lambda words: words[2])
def test_the_job_at_its_head_is_planned_with_the_same_settings(monkeypatch, capsys, words):
    monkeypatch.chdir(REPOSITORY)
    config = REPOSITORY / words[2]
    status, found = plan(capsys, config, *words[3:])
    _, started_by_hand = plan(capsys, config)
    assert status == 0
    assert found["fits"]
    assert found["layout"] == started_by_hand["layout"]  # as many servers too
    assert found["step"] == started_by_hand["step"]


@pytest.mark.parametrize("config", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda config: config.stem)
def test_they_are_short(config):
    assert len(config.read_text().splitlines()) <= MAX_LINES


def test_the_demo_fits_this_machine(capsys):
    policy = Path(__file__).parents[2] / "benchmarks" / "small_model"
    demo = EXAMPLES / "demo" / "train.yaml"
    options = ["--gpu", "cpu", "--memory-gib", "8", "--json", "rollout.engine=embedded"]
    assert main(["plan", str(demo), f"model.path={policy}", *options]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
