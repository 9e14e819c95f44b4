"""Sweep files: what they vary, and how mistakes in them are named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.config.storage_url import without_password
from perl_megatron.config.sweep_domain import Domain, grid_points
from perl_megatron.config.sweep_file import Sweep, read_sweep
from perl_megatron.errors import UserError

HEAD = "sweep:\n  name: case\n  config: train.yaml\n"


def read(folder: Path, text: str, *overrides: str) -> Sweep:
    path = folder / "sweep.yaml"
    path.write_text(HEAD + text)
    return read_sweep(path, overrides)


def test_every_kind_of_field_can_be_varied(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        """  sampler: grid
  overrides: [run.steps=7]
  seed_overrides: ["model.path=start-{seed}"]
  seeds: 3,5
space:
  optimizer.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true, points: 3}
  rollout.num_rollouts: {low: 2, high: 8, step: 3}
  algorithm.ratio: [token, sequence]
  filter.no_signal: [true, false]
  algorithm.dual_clip: [null, 3.0]
  data.weights: [[1, 2], [2, 1]]
arms:
  plain GRPO: [permutation.num_permuted=0]
  PeRL: [permutation.num_permuted=1, preset=paper]
""",
    )
    assert sweep.sweep.seeds == (3, 5)
    assert sweep.num_trials == 3 * 3 * 2 * 2 * 2 * 2 * 2
    assert sweep.points is not None
    point = sweep.points[0]
    assert point["optimizer.learning_rate"] == 1e-5
    overrides = sweep.overrides({**point, "arm": "PeRL"}, 3)
    assert overrides[:2] == ["run.steps=7", "model.path=start-3"]
    assert overrides[-1] == "run.seed=3"
    assert {"optimizer.learning_rate=1e-05", 'algorithm.ratio="token"', "filter.no_signal=true"} < set(overrides)
    assert {"algorithm.dual_clip=null", "data.weights=[1, 2]", "preset=paper"} < set(overrides)
    grids = {domain.name: domain.grid() for domain in sweep.space}
    assert grids["optimizer.learning_rate"] == [1e-5, 1e-4, 1e-3]
    assert grids["rollout.num_rollouts"] == [2, 5, 8]


def test_a_base_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "sweep: {sampler: random, trials: 9}\nspace:\n  optimizer.beta1: [0.8, 0.9]\n  optimizer.beta2: [0.9, 0.95]\n"
    )
    text = "base: base.yaml\nspace:\n  optimizer.beta1: {low: 0.5, high: 0.9}\n"
    sweep = read(tmp_path, text, "sweep.trials=4", "workers.retries=0")
    assert (sweep.sweep.sampler, sweep.num_trials, sweep.workers.retries) == ("random", 4, 0)
    kinds = {domain.name: domain.kind for domain in sweep.space}
    assert kinds == {"optimizer.beta1": "float", "optimizer.beta2": "choice"}


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("  trials: 3\nspace:\n  optimizer.learningrate: [1.0]\n", "did you mean 'optimizer.learning_rate'", 6),
        ("  trials: 3\nspace:\n  run.seed: [1, 2]\n", "set by the sweep itself", 6),
        ("  trials: 3\nspace:\n  algorithm.ratio: {low: 1, high: 2}\n", "is no number", 6),
        ("  trials: 3\nspace:\n  optimizer.beta1: {low: 0.9, high: 0.1}\n", "is not below high", 6),
        ("  trials: 3\nspace:\n  optimizer.beta1: {low: 0, high: 0.1, log: true}\n", "has no logarithm", 6),
        ("  trials: 3\nspace:\n  rollout.num_rollouts: {low: 1.5, high: 4}\n", "takes whole numbers", 6),
        ("  trials: 3\nspace:\n  optimizer.beta1: {low: 0.1, hihg: 0.4}\n", "high", 6),
        ("  trials: 3\nspace:\n  optimizer.beta1: {low: 0.1, high: 0.4, steps: 2}\n", "the keys are low, high", 6),
        ("  trials: 3\nspace:\n  optimizer.beta1: [0.1, 0.1]\n", "twice", 6),
        ("  trials: 3\nspace:\n  optimizer.beta1: []\n", "has no choices", 6),
        ("  trials: 3\nspace:\n  optimizer.beta1: [{low: 1}]\n", "has a choice that is no value: {'low': 1}", 6),
        ("  trials: 3\nspace:\n  optimizer.beta1: 0.4\n", "is no set of values", 6),
        ("  trials: 3\narms:\n  one: run.steps=2\n", "no list of settings", 6),
        ("  trials: 3\narms:\n  one: [run.seed=2]\n", "set by the sweep itself", 6),
        ("  trial: 3\nspace:\n  optimizer.beta1: [0.1]\n", "unknown key 'sweep.trial'", 4),
        ("  seeds: [1, 1]\n  trials: 3\nspace:\n  optimizer.beta1: [0.1]\n", "a seed is there twice", 4),
        ("  trials: 3\n  reference: two\narms:\n  one: [run.steps=2]\n", "there is no arm 'two'", 5),
        ("  trials: 3\nworkers: {grace: 30}\nspace:\n  optimizer.beta1: [0.1]\n", "less than two heartbeats", 5),
        ("  sampler: grid\n  trials: 3\nspace:\n  optimizer.beta1: [0.1]\n", "the grid has 1 points, not 3", 5),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, what: str, line: int, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert what in str(error.value)
    assert f"sweep.yaml:{line}" in str(error.value.where)
    assert error.value.fix


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("space:\n  optimizer.beta1: [0.1]\n", "'sweep.trials' has to be set"),
        ("  sampler: grid\nspace:\n  optimizer.beta1: {low: 0.1, high: 0.2}\n", "a grid needs the values"),
        ("  trials: 3\n", "the sweep varies nothing"),
    ],
)
def test_what_is_missing_is_named(text: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert what in str(error.value)
    assert error.value.fix


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file") as error:
        read_sweep(tmp_path / "sweep.yaml")
    assert error.value.where == str(tmp_path / "sweep.yaml")
    assert "paths are relative to the current directory" in (error.value.fix or "")


def test_the_command_line_of_a_sweep_has_what_was_set_on_it(tmp_path: Path) -> None:
    text = "  trials: 3\nspace:\n  optimizer.beta1: [0.1]\n"
    url = "sweep.storage=postgresql://me:secret@host:5432/optuna?sslmode=require&password=hidden"
    sweep = read(tmp_path, text, "sweep.name=b", "sweep.measures=[reward/mean, loss/total]", url)
    assert sweep.command("--results") == (
        f"perl-megatron sweep {tmp_path}/sweep.yaml --results sweep.name=b 'sweep.measures=[reward/mean, loss/total]' "
        "'sweep.storage=postgresql://me:***@host:5432/optuna?sslmode=require&password=***'"
    )
    assert without_password("sqlite:////a:b@c/d.db") == "sqlite:////a:b@c/d.db"
    assert without_password("mysql+pymysql://me:@host/x") == "mysql+pymysql://me:***@host/x"


@settings(deadline=None, max_examples=60)
@given(low=st.floats(1e-8, 1.0), factor=st.floats(1.5, 1e6), count=st.integers(2, 9), log=st.booleans())
def test_grids_go_from_bound_to_bound_in_even_steps(low: float, factor: float, count: int, log: bool) -> None:
    domain = Domain("optimizer.learning_rate", "float", low=low, high=low * factor, log=log, points=count)
    values = domain.grid()
    assert values is not None
    numbers = [float(value) for value in values if value is not None]
    assert (numbers[0], numbers[-1], len(numbers)) == (low, low * factor, count)
    gaps = [b / a if log else b - a for a, b in pairwise(numbers)]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-4)
    assert grid_points([domain]) == [{"optimizer.learning_rate": value} for value in values]
