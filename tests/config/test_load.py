from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.config.load import config_fields, load_config, save_resolved
from perl_megatron.errors import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return write(
        tmp_path / "run.yaml",
        "model:\n  path: models/tiny\nrun:\n  name: 2026\n  steps: 010\noptimizer:\n  learning_rate: 1e-4\n",
    )


def error_of(path, *overrides) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return caught.value


def test_values_and_origins(file):
    loaded = load_config(file, ["run.seed=7", "optimizer.beta1=5e-1", "optimizer.beta1=0.25"])
    config = loaded.config
    assert (config.model.path, config.run.name, config.run.steps) == (Path("models/tiny"), "2026", 10)
    assert (config.optimizer.learning_rate, config.optimizer.beta1, config.run.seed) == (1e-4, 0.25, 7)
    assert loaded.origins["optimizer.learning_rate"] == f"{file}:7"
    assert loaded.origins["run.seed"] == "command line"
    assert loaded.origins["run.keep_checkpoints"] == "default"
    assert set(loaded.origins) == set(config_fields())


def test_every_field_has_a_description():
    assert [key for key, info in config_fields().items() if not info.description] == []


def test_text_overrides_are_taken_as_they_are(file):
    loaded = load_config(
        file, ['data.system_prompt=Say: "é" # {x}', "data.train=null", "run.name='5'", "algorithm.dual_clip="]
    )
    assert loaded.config.data.system_prompt == 'Say: "é" # {x}'
    assert loaded.config.data.train == ()
    assert loaded.config.run.name == "5"
    assert loaded.config.algorithm.dual_clip is None


def test_a_section_can_be_overridden_at_once(file):
    loaded = load_config(file, ["optimizer={learning_rate: 2e-5, beta1: 0.8}"])
    assert (loaded.config.optimizer.learning_rate, loaded.config.optimizer.beta1) == (2e-5, 0.8)


def test_base_files_are_inherited_and_own_keys_win(tmp_path):
    (tmp_path / "shared").mkdir()
    base = write(tmp_path / "shared" / "base.yaml", "model: {path: a}\nrun:\n  steps: 5\n  seed: 3\n")
    child = write(tmp_path / "child.yaml", "run:\n  steps: 6\nbase: shared/base.yaml\n")
    loaded = load_config(child)
    assert (loaded.config.run.steps, loaded.config.run.seed) == (6, 3)
    assert loaded.origins["run.seed"] == f"{base}:4"
    assert loaded.origins["run.steps"] == f"{child}:2"


def test_base_circle(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "circle" in error_of(tmp_path / "a.yaml").what


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rate"),
        ("learning_rate=1", "optimizer.learning_rate"),
        ("rollout.learning_rate=1", "optimizer.learning_rate"),
        ("optimiser.beta1=1", "optimizer.beta1"),
        ("permutation.n_permuted=1", "permutation.num_permuted"),
        ("modle={path: x}", "model"),
    ],
)
def test_unknown_key_names_the_nearest(file, wrong, meant):
    error = error_of(file, wrong)
    assert f"unknown key '{wrong.partition('=')[0]}'" in error.what
    assert error.where == "command line"
    assert f"'{meant}'" in str(error.fix)


def test_unknown_key_in_a_file_names_its_line(tmp_path):
    path = write(tmp_path / "x.yaml", "model:\n  path: x\n\n  dtyp: float32\n")
    error = error_of(path)
    assert (error.what, error.where) == ("unknown key 'model.dtyp'", f"{path}:4")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.steps=0", "greater than or equal to 1"),
        ("run.steps=true", "valid integer"),
        ("run.steps='3'", "valid integer"),
        ("run.steps=1.5", "valid integer"),
        ("run.steps=[1", "not valid YAML"),
        ("run=3", "is a section"),
        ("run.steps", "is not an override"),
        ("run.name=a/b", "pattern"),
        ("optimizer.learning_rate=.inf", "valid number"),
        ("optimizer.learning_rate=1e999", "valid number"),
        ("algorithm.kl_estimator=k4", "'k1', 'k2' or 'k3'"),
        ("parallel.context=0", "greater than or equal to 1"),
        ("run.seed=!!python/object:os.system x", "tag"),
        ("run.record_rollouts=yes", "valid boolean"),
    ],
)
def test_wrong_values(file, override, says):
    error = error_of(file, override)
    assert says in error.what
    assert "command line" in str(error.where)


def test_wrong_value_in_a_file_names_its_line_and_what_is_allowed(tmp_path):
    path = write(tmp_path / "x.yaml", "model: {path: x}\nrun:\n  steps: many\n")
    error = error_of(path)
    assert error.what == 'run.steps = "many": input should be a valid integer'
    assert error.where == f"{path}:3"
    assert "Number of training steps" in str(error.fix)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run:\n  steps: 1\nrun:\n  seed: 2\n", "'run' is set twice (first in line 1)"),
        ("run:\n  steps: 1\n  steps: 2\n", "'steps' is set twice (first in line 2)"),
        ("- 1\n", "holds sections"),
        ("run: {steps: &a [*a]}\n", "contains itself"),
        ("run:\n\tsteps: 1\n", "not valid YAML"),
        ("", "'model.path' has to be set"),
        ("base: [a]\n", "path of one config file"),
    ],
)
def test_broken_files(tmp_path, text, says):
    assert says in error_of(write(tmp_path / "x.yaml", text)).what


def test_missing_and_binary_files(tmp_path):
    missing = error_of(tmp_path / "none.yaml")
    assert missing.what == "cannot read the config file: No such file or directory"
    assert str(Path.cwd()) in missing.fix
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in error_of(tmp_path / "b.yaml").what
    assert "UTF-8" in error_of(tmp_path / "b.yaml").fix


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(1e-300, 1e300), st.integers(0, 2**63))
def test_resolved_config_loads_equal(tmp_path_factory, prompt, learning_rate, seed):
    path = tmp_path_factory.mktemp("resolved") / "config.yaml"
    loaded = load_config(
        None, ["model.path=my models/ü", f"run.seed={seed}", f"optimizer.learning_rate={learning_rate!r}"]
    )
    data = loaded.config.data.model_copy(update={"system_prompt": prompt})
    loaded = type(loaded)(loaded.config.model_copy(update={"data": data}), loaded.origins)
    save_resolved(loaded, path)
    assert load_config(path).config == loaded.config


def test_resolved_config_shows_origins(file, tmp_path):
    save_resolved(load_config(file, ["run.seed=7"]), tmp_path / "resolved.yaml")
    text = (tmp_path / "resolved.yaml").read_text()
    assert "  seed: 7  # command line\n" in text
    assert f"  steps: 10  # {file}:5\n" in text
    assert "  keep_checkpoints: 2  # default\n" in text


def test_a_key_of_an_earlier_version_is_told_from_a_misspelt_one(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("optimizer:\n  micro_batch_sequences: 8\n")
    with pytest.raises(UserError, match=r"no setting any more: .* actor\.micro_batch_tokens") as caught:
        load_config(file)
    assert caught.value.fix == "remove the line"


def test_a_run_of_an_earlier_version_can_go_on(tmp_path):
    file = tmp_path / "config.yaml"
    save_resolved(load_config(None, ["model.path=policy", "run.steps=7"]), file)
    text = file.read_text()
    assert "run:\n" in text
    file.write_text(text.replace("run:\n", "run:\n  collective_timeout: 1800.0  # default\n"))
    assert load_config(file).config.run.steps == 7
    file.write_text(text.replace("run:\n", "run:\n  colective_timeout: 1800.0  # default\n"))
    with pytest.raises(UserError, match="unknown key"):
        load_config(file)


def test_a_file_is_looked_at_once_however_many_old_keys_it_has(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    save_resolved(load_config(None, ["model.path=policy"]), file)
    old = {"run:\n": "  collective_timeout: 1800.0\n", "optimizer:\n": "  micro_batch_sequences: 8\n"}
    text = file.read_text()
    for section, line in old.items():
        text = text.replace(section, section + line)
    file.write_text(text)
    opened, open_file = [], Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *args, **options: opened.append(path) or open_file(path, *args, **options)
    )
    assert load_config(file).config.model.path == Path("policy")
    assert opened.count(file) == 2  # its text, and whether a run wrote it
