"""The ablation: every arm is a run that could start, and the table says what its runs measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import derive
from perl_megatron.config.load import load_config

FOLDER = Path(__file__).parents[2] / "examples" / "ablation"
SIZES = FOLDER.parent / "qwen2_5_vl" / "3b"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the ablation, which imports its neighbour."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


def test_every_arm_samples_the_same_number_of_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    run = module("run", monkeypatch)
    budgets = set()
    for overrides in run.read_arms().values():
        config = load_config(FOLDER / "ablation.yaml", overrides).config
        numbers = derive(config, world_size=1, architecture=read_architecture_numbers(SIZES))
        budgets.add((numbers.group_size, numbers.questions_per_step, numbers.total_steps, config.filter.max_refills))
    assert budgets == {(12, 16, 25, 0)}


def test_runs_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = module("run", monkeypatch)
    names = {run.run_name(arm, seed) for arm in run.read_arms() for seed in range(5)}
    assert len(names) == 5 * len(run.read_arms())
    assert all(load_config(FOLDER / "ablation.yaml", [f"run.name={name}"]) for name in names)


def test_the_table_pairs_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds far apart whose difference is the same: the difference is known, its sides are not."""
    run = module("run", monkeypatch)
    reference, other, *_ = (arm for arm in run.read_arms() if arm.startswith("n_s = 1"))
    numbers = {reference: [0.6, 0.8, 0.7], other: [0.65, 0.85]}
    for arm, accuracies in numbers.items():
        for seed, accuracy in enumerate(accuracies):
            folder = tmp_path / run.run_name(arm, seed)
            folder.mkdir()
            summary = {"accuracy_before": 0.5, "flip_rate_before": 0.25, "flip_rate_after": 0.25, "groups_kept": 100}
            (folder / "summary.json").write_text(json.dumps(summary | {"accuracy_after": accuracy}))
    command = [sys.executable, FOLDER / "table.py", "--runs", tmp_path, "--plot", tmp_path / "plot.png"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    assert rows[2][:3] == ["before training", "3", "50.0% ± 0.0%"]
    # 0.1 / √3 times the quantile 4.303 of two degrees of freedom.
    assert rows[3] == [reference, "3", "70.0% ± 24.8%", "", "25.0% ± 0.0%", "", "100"]
    assert rows[4][:4] == [other, "2", "75.0% ± 127.1%", "+5.0% ± 0.0%"]
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_without_runs_the_command_that_makes_them_is_named(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / "table.py", "--runs", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "examples/ablation/run.py" in result.stderr
