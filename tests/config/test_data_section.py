from pathlib import Path

import pytest
from derive_case import TINY

from perl_megatron.config.derive import derive, require_training_data
from perl_megatron.config.load import load_config, save_resolved
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError


def config_of(*overrides: str) -> Config:
    return load_config(None, ["model.path=unused", *overrides]).config


@pytest.mark.parametrize(
    ("written", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("/data/my set/a.jsonl", ["/data/my set/a.jsonl"]),
        ("a.jsonl, b", ["a.jsonl", "b"]),
        ("[a.jsonl, 'b,c.jsonl']", ["a.jsonl", "b,c.jsonl"]),
        ("[]", []),
        ("null", []),
    ],
)
def test_paths_stand_alone_or_in_a_list(written, paths, tmp_path):
    assert config_of(f"data.train={written}").data.train == tuple(map(Path, paths))
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: unused}}\ndata:\n  train: {written}\n")
    loaded = load_config(file)
    assert loaded.config.data.train == tuple(map(Path, paths))
    save_resolved(loaded, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml").config == loaded.config


@pytest.mark.parametrize(
    ("written", "weights"), [("[2, 0.5]", (2.0, 0.5)), ("2,0.5", (2.0, 0.5)), ("3", (3.0,)), ("null", None)]
)
def test_weights_are_numbers(written, weights):
    assert config_of(f"data.weights={written}").data.weights == weights


@pytest.mark.parametrize("written", ["[1, -1]", "[0]", "a,b", "[1, x]", "[.inf]", "true"])
def test_other_weights_are_refused(written):
    with pytest.raises(UserError, match=r"data\.weights"):
        config_of(f"data.weights={written}")
    with pytest.raises(UserError, match=r"data\.train"):
        config_of("data.train=[1]")


def test_there_is_a_weight_for_each_path():
    for overrides in (("data.train=a,b", "data.weights=[1]"), ("data.train=a", "data.weights=[1,2]")):
        with pytest.raises(UserError, match=r"weights for \d paths") as refusal:
            derive(config_of(*overrides), world_size=1, architecture=TINY)
        assert refusal.value.where == "data.weights, data.train"


def test_training_data_are_files_or_folders(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "imported").mkdir()
    require_training_data(config_of(f"data.train={tmp_path / 'a.jsonl'},{tmp_path / 'imported'}"))
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        require_training_data(config_of(f"data.train={tmp_path / 'a.jsonl'},{tmp_path / 'none.jsonl'}"))
    with pytest.raises(UserError, match="imported does not exist") as refusal:
        require_training_data(
            config_of(f"data.train={tmp_path / 'a.jsonl'}", f"data.evaluation={tmp_path / 'imported'}")
        )
    assert refusal.value.where == "data.evaluation"
