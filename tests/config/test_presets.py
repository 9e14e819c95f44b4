"""Presets: every one loads and derives, alone and on top of others; what wins over what; what the origin says."""

from itertools import product

import pytest
import yaml
from derive_case import TINY

from perl_megatron.cli import parse
from perl_megatron.config.derive import derive
from perl_megatron.config.load import config_fields, load_config, save_resolved
from perl_megatron.config.preset_source import FOLDER, preset_names
from perl_megatron.errors import UserError

WHOLE = {"paper", "released", "grpo"}
"""Presets that say how many views there are; the others leave that to them."""
RUN = ["model.path=m", "rollout.engine=embedded"]


def loaded_of(*presets, file=None, overrides=()):
    return load_config(file, [*RUN, *(f"preset={name}" for name in presets), *overrides])


def test_the_published_methods_are_there():
    expected = {"paper", "released", "grpo", "dr_grpo", "dapo", "gspo", "cispo"}
    assert expected <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_derives(name):
    loaded = loaded_of(name)
    derived = derive(loaded.config, world_size=1, architecture=TINY)
    assert derived.group_size > 1
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    keys = {f"{section}.{key}" for section, values in content.items() for key in values}
    assert {key for key, origin in loaded.origins.items() if origin == f"preset {name}"} == keys
    for key in keys:
        section, leaf = key.split(".")
        assert getattr(getattr(loaded.config, section), leaf) == content[section][leaf], key


@pytest.mark.parametrize("name", preset_names())
def test_every_value_of_a_preset_names_its_source(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    values = [line for line in lines if line.startswith("  ")]
    assert values
    assert [line for line in values if "  # " not in line] == []


@pytest.mark.parametrize(
    ("whole", "variant"), product(sorted(WHOLE), sorted(set(preset_names()) - WHOLE)), ids=lambda name: name
)
def test_a_variant_goes_on_top_of_a_whole_method(whole, variant):
    config = loaded_of(whole, variant).config
    if whole == "grpo" and config.permutation.num_permuted == 0:
        assert config.rollout.num_rollouts == 12
    derive(config, world_size=1, architecture=TINY)


def test_the_numbers_of_paper_and_release():
    """The table of shared/method.md."""
    paper, released = loaded_of("paper").config, loaded_of("released").config
    for config in (paper, released):
        group = config.permutation.num_permuted + 1, config.rollout.num_rollouts
        assert (*group, config.rollout.questions_per_step) == (2, 6, 128)
        assert (config.optimizer.learning_rate, config.optimizer.schedule) == (1e-6, "constant")
        assert (config.algorithm.kl_coefficient, config.rollout.max_response_tokens) == (0.01, 2048)
        assert (config.reward.accuracy, config.reward.format) == (0.9, 0.1)
    assert (paper.data.max_prompt_tokens, released.data.max_prompt_tokens) == (8192, 16384)
    assert (paper.algorithm.ratio, paper.algorithm.aggregation, paper.algorithm.dual_clip) == ("sequence",) * 2 + (
        None,
    )
    assert (released.algorithm.ratio, released.algorithm.aggregation, released.algorithm.dual_clip) == (
        "token",
        "token",
        3,
    )
    assert (released.permutation.orders, released.data.max_pixels) == ("released", 262144)
    derived = derive(released, world_size=1, architecture=TINY)
    assert derived.sequences_per_update == 64 * 6  # mini-batches of 64 prompts times n


def test_the_files_own_keys_win_and_the_command_line_over_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("algorithm:\n  clip_low: 0.1\n  clip_high: 0.3\npreset: gspo\n")
    loaded = load_config(file, [*RUN, "algorithm.clip_high=0.4"])
    assert (loaded.config.algorithm.clip_low, loaded.config.algorithm.clip_high) == (0.1, 0.4)
    assert loaded.config.algorithm.ratio == "sequence_mean"
    assert loaded.origins["algorithm.clip_low"] == f"{file}:2"
    assert loaded.origins["algorithm.clip_high"] == "command line"
    assert loaded.origins["algorithm.ratio"] == "preset gspo"
    assert loaded.origins["run.seed"] == "default"
    # Also a preset of the command line, wherever it stands, is below the file's keys.
    late = load_config(file, [*RUN, "algorithm.clip_high=0.4", "preset=dapo"])
    assert (late.config.algorithm.clip_low, late.config.algorithm.clip_high) == (0.1, 0.4)
    assert late.origins["algorithm.ratio"] == "preset dapo"


@pytest.mark.parametrize("value", ["[grpo, dapo]", "grpo, dapo", "grpo,dapo", "\n- grpo\n- dapo"])
def test_of_several_the_later_wins(tmp_path, value):
    file = tmp_path / "run.yaml"
    file.write_text(f"preset: {value}\n")
    loaded = load_config(file, RUN)
    assert loaded.origins["algorithm.kl_coefficient"] == "preset dapo"
    assert loaded.origins["permutation.num_permuted"] == "preset grpo"
    assert load_config(None, [*RUN, "preset=[grpo, dapo]"]).config == loaded.config
    assert load_config(None, [*RUN, "preset=grpo", "preset=dapo"]).config == loaded.config


def test_a_bases_presets_come_first_and_its_keys_win(tmp_path):
    (tmp_path / "base.yaml").write_text("preset: grpo\nalgorithm:\n  clip_high: 0.7\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\npreset: dapo\n")
    loaded = load_config(child, RUN)
    assert loaded.origins["algorithm.kl_coefficient"] == "preset dapo"
    assert loaded.config.algorithm.clip_high == 0.7
    assert loaded.config.permutation.num_permuted == 0


@pytest.mark.parametrize(
    ("value", "what", "fix"),
    [
        ("papr", "no preset 'papr'", "did you mean 'paper'"),
        ("Dr.GRPO", "no preset 'Dr.GRPO'", "there are cispo, "),
        ("dr-grpo", "no preset 'dr-grpo'", "'dr_grpo'"),
        ("paper,", "no preset ''", "there are"),
        ("", "a name or a list", "choose of"),
        ("3", "a name or a list", "choose of"),
        ("[paper, 3]", "a name or a list", "choose of"),
        ("../presets/paper", "no preset", "there are"),
    ],
)
def test_unknown_presets_are_refused(tmp_path, value, what, fix):
    for source in ("file", "command line"):
        file = tmp_path / "run.yaml"
        file.write_text(f"# one\npreset: {value}\n" if source == "file" else "")
        with pytest.raises(UserError) as refused:
            load_config(file, [*RUN] if source == "file" else [*RUN, f"preset={value}"])
        assert what in refused.value.what
        assert fix in str(refused.value.fix)
        assert str(refused.value.where) == (f"{file}:2" if source == "file" else "command line")


def test_a_misspelt_key_is_told_from_a_preset(tmp_path):
    with pytest.raises(UserError, match="unknown key 'presets'") as refused:
        load_config(None, [*RUN, "presets=paper"])
    assert "'preset'" in str(refused.value.fix)


@pytest.mark.parametrize("name", preset_names())
def test_the_resolved_config_says_where_values_come_from_and_loads_equal(tmp_path, name):
    loaded = loaded_of(name, overrides=["run.seed=3"])
    save_resolved(loaded, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert f"  # preset {name}\n" in text
    again = load_config(tmp_path / "config.yaml")
    assert again.config == loaded.config
    assert set(again.origins) == set(config_fields())


def test_the_command_line_takes_presets():
    options = parse(["plan", "x.yaml", "--preset", "paper", "run.seed=1", "--preset", "gspo"])
    assert options.overrides == ["preset=paper", "preset=gspo", "run.seed=1"]
    assert parse(["train", "x.yaml", "preset=paper", "--resume"]).overrides == ["preset=paper"]


def test_presets_are_installed_with_the_package():
    assert '"config/presets/*.yaml"' in (FOLDER.parents[2] / "setup.py").read_text()
    assert (FOLDER.parents[2] / "perl_megatron/config/presets").samefile(FOLDER)
