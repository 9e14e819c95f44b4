"""The ablation: every arm is a run that could start, and all have the same budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import derive
from perl_megatron.config.load import load_config
from perl_megatron.config.sweep_file import Sweep, read_sweep
from perl_megatron.errors import UserError
from perl_megatron.sweep.check import check_sweep, measures

REPOSITORY = Path(__file__).parents[2]
SIZES = REPOSITORY / "examples" / "qwen2_5_vl" / "3b"


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.chdir(REPOSITORY)  # the paths of a config are relative to the current directory
    return read_sweep(Path("examples/ablation/sweep.yaml"))


def test_every_arm_samples_the_same_number_of_responses(ablation: Sweep) -> None:
    assert ablation.points is not None
    assert len(ablation.points) == 7
    budgets = set()
    for point in ablation.points:
        config = load_config(ablation.sweep.config, ablation.overrides(point, 3)).config
        assert config.model.path == Path("runs/demo-start-3/warm_start/export")
        numbers = derive(config, world_size=1, architecture=read_architecture_numbers(SIZES))
        budgets.add((numbers.group_size, numbers.questions_per_step, numbers.total_steps, config.filter.max_refills))
    assert budgets == {(12, 16, 25, 0)}
    assert [measure.metric for measure in measures(ablation)][:2] == ["evaluation/accuracy", "evaluation/flip_rate"]


def test_it_starts_only_with_every_seeds_policy(ablation: Sweep, tmp_path: Path) -> None:
    """The seeds are prepared one by one: a seed that was forgotten is named before anything runs."""
    section = ablation.sweep
    moved = [text.replace("runs/", f"{tmp_path}/") for text in section.seed_overrides]
    overrides = [f"sweep.seed_overrides={json.dumps(moved)}"]
    for seed in range(4):
        for file in ("warm_start/export/config.json", "data/train.jsonl", "data/heldout.jsonl"):
            path = tmp_path / f"demo-start-{seed}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((SIZES / "config.json").read_text() if path.suffix == ".json" else "{}\n")
    sweep = read_sweep(ablation.path, overrides)
    with pytest.raises(UserError) as error:
        check_sweep(sweep)
    assert f"model.path = {tmp_path}/demo-start-4/warm_start/export" in str(error.value.where)
    check_sweep(read_sweep(ablation.path, [*overrides, "sweep.seeds=0,1,2,3"]))
