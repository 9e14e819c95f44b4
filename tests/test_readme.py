"""What README and docs/cluster.md tell people to type is well-formed; the end-to-end tests run the same commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from perl_megatron.cli import parse
from perl_megatron.config.derive_launch import check_slurm
from perl_megatron.config.load import load_config
from perl_megatron.config.sweep_file import read_sweep
from perl_megatron.data.permutation import apply_order, validate_contract
from perl_megatron.types import AnswerRule, PermutationContract, Record

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
CODE = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
CLUSTER = re.findall(r"```(\w*)\n(.*?)```", (REPOSITORY / "docs" / "cluster.md").read_text(), re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in [*CODE, *CLUSTER]
    if not language
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_exist(command: list[str]) -> None:
    if command[0] == "perl-megatron":
        options = parse(command[1:])
        if command[1] == "sweep":
            read_sweep(REPOSITORY / options.config, options.overrides)
        elif "config" in vars(options):
            load_config(REPOSITORY / options.config, options.overrides)
    elif command[0] == "make":
        targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert {argument for argument in command[1:] if "=" not in argument} <= set(targets)
    else:
        assert command[0] in ("sh", "python", "pip", "tensorboard", "git", "cat"), command
        scripts = [part for part in command if part.endswith((".sh", ".py"))]
        assert all((REPOSITORY / script).is_file() for script in scripts)


def test_the_example_of_a_slurm_job_is_valid(tmp_path: Path) -> None:
    example = tmp_path / "job.yaml"
    example.write_text("model: {path: m}\n" + next(block for language, block in CLUSTER if language == "yaml"))
    check_slurm(load_config(example, [f"launch.setup_file={example}"]).config, "train")


def test_the_example_record_is_valid() -> None:
    row = json.loads(next(block for language, block in CODE if language == "json").replace("\n", " "))
    contract = dict(row["contract"])
    record = Record(
        id=row["id"],
        images=tuple(Path(name) for name in row["images"]),
        text=row["text"],
        answer=row["answer"],
        answer_type=row["answer_type"],
        contract=PermutationContract(
            movable=tuple(contract["movable"]),
            references=tuple(contract["references"]),
            answer=AnswerRule(contract["answer"]),
            option_slots=tuple(contract["option_slots"]),
        ),
    )
    validate_contract(record)
    assert apply_order(record, (1, 0), 1).answer == "A"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target
    for path in re.findall(r"`((?:perl_megatron|tests|tools|examples|requirements|docs)/[\w./-]+)`", README):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("config", sorted((REPOSITORY / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(config: Path) -> None:
    # The data tool's recipe, which tests/end_to_end uses, and a sweep, which tests/examples/test_ablation.py loads.
    if config.name not in ("digits.yaml", "sweep.yaml"):
        load_config(config)
