"""The tool as a person uses it; difficulty by a policy in its own process."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from mantis_case import answer_by_rules, lines, write_table
from random_checkpoint import tool
from scripted_endpoint import ScriptedEndpoint
from tiny_checkpoint import make_policy

from perl_megatron.config.load import config_fields, load_sections
from perl_megatron.data.records import read_records
from perl_megatron.preparation.settings import PreparationSettings


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("mantis"))


def prepare(*arguments: object) -> int:
    return tool("prepare_mantis").main([str(argument) for argument in arguments])


def test_a_dry_run(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(out, f"source.path={source}", "--dry-run", "--show", "1", "difficulty.num_rollouts=4") == 0
    printed = capsys.readouterr().out
    assert "rephrase: open-0" in printed
    assert "Right answer:\ntwo" in printed
    assert "one token for 4 characters" in printed
    assert "88" in printed  # replies: 22 questions, 4 each
    assert not out.exists()


def test_all_stages_with_the_embedded_engine(source, tmp_path, capsys):
    """The policy of a run's config, in its engine; the language model behind an endpoint."""
    policy = tmp_path / "policy.yaml"
    model = make_policy(tmp_path / "model")
    policy.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(model), "dtype": "float32"},
                "data": {"max_pixels": 3136, "min_pixels": 784},
                "rollout": {"engine": "embedded"},
            }
        )
    )
    settings = tmp_path / "settings.yaml"
    with ScriptedEndpoint(answer_by_rules) as endpoint:
        settings.write_text(
            yaml.safe_dump(
                {
                    "source": {"path": str(source)},
                    "endpoint": {"url": endpoint.url},
                    "difficulty": {"policy": str(policy), "num_rollouts": 3, "max_response_tokens": 8},
                    "resample": {"histogram": [1, 1], "size": 10},
                }
            )
        )
        out = tmp_path / "out"
        assert prepare(out, "--settings", settings) == 0
        printed = capsys.readouterr().out
        assert prepare(out, "--settings", settings) == 0  # nothing is left to do
        assert capsys.readouterr().out == printed
        raw = lines(out / "03_difficulty.raw.jsonl")
        shutil.rmtree(model)
        make_policy(model, seed=1)  # another checkpoint at the same place
        assert prepare(out, "--settings", settings) == 0
    assert lines(out / "replaced" / "1" / "03_difficulty.raw.jsonl") == raw
    assert lines(out / "03_difficulty.raw.jsonl") != raw
    assert not (out / "replaced" / "1" / "02_rephrase.jsonl").exists()
    raw = lines(out / "03_difficulty.raw.jsonl")
    assert len(raw) == 18
    assert {len(row["responses"]) for row in raw} == {3}
    assert {row["accuracy"] for row in lines(out / "03_difficulty.jsonl")} <= {0, 1 / 3, 2 / 3, 1}
    assert len({response["text"] for row in raw for response in row["responses"]}) > 30
    assert len(read_records(out / "records.jsonl", max_corrupt_fraction=0).records) == 10
    assert "records.jsonl" in printed
    assert "images may change their order in" in printed
    assert json.loads((out / "counts.json").read_text())["stages"]["rules"]["out"] == 22


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "'source.path' has to be set"),
        (["source.path=/none"], "/none does not exist"),
        (["source.path={source}", "source.pth=x"], "did you mean 'source.path'?"),
        (["source.path={source}", "rules.max_images=many"], "rules.max_images"),
        (["source.path={source}", "rules.kinds=open,closed"], "rules.kinds"),
        (["source.path={source}", "resample.histogram=1,x"], "resample.histogram"),
        (["source.path={source}", "label.prompt=/none.md"], "cannot read the prompt"),
        (["source.path={source}", "difficulty.policy=/none.yaml"], "cannot read the config file"),
        (["source.path={source}"], "set endpoint.url"),
        (["source.path={source}", "endpoint.url=nowhere"], "is not an address"),
    ],
)
def test_a_mistake_is_one_message(source, tmp_path, capsys, arguments, told):
    status = prepare(tmp_path / "out", *(argument.format(source=source) for argument in arguments))
    assert status == 2
    assert told in capsys.readouterr().err


def test_what_the_documentation_names_exists(tmp_path):
    text = (Path(__file__).resolve().parents[2] / "docs" / "preparation.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "settings.yaml").write_text(block)
    settings, _ = load_sections(PreparationSettings, tmp_path / "settings.yaml")
    assert settings.resample.size == 22000
    keys = config_fields(PreparationSettings).keys()
    sections = "|".join(PreparationSettings.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.\w+)", text))
    assert len(named) > 10
    assert named <= keys


def test_lists_may_be_written_with_commas(source, tmp_path, capsys):
    arguments = (f"source.path={source}", "--until", "rules", "rules.kinds=choice", "resample.histogram=1,2.5,0")
    assert prepare(tmp_path / "out", *arguments) == 0
    assert "the question type is 'open'" in capsys.readouterr().out
    assert len(lines(tmp_path / "out" / "01_rules.jsonl")) == 10
