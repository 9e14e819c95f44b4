"""An infinite weight on one rank: all ranks skip the update, keep the batch, and name what is infinite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch_ranks import launch_ranks
from skipped_worker import LAYOUTS

WORKER = Path(__file__).with_name("skipped_worker.py")


@pytest.fixture(scope="module")
def out(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipped")
    launch_ranks(WORKER, cases / "untied", folder, log=folder / "ranks.log")
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_skip_together(out: Path, name: str) -> None:
    report = json.loads((out / f"{name}.json").read_text())
    assert report["skipped"] == [1.0, 1.0]
    assert report["unchanged"] == [True, True]
    assert report["same_batch"]
    first, second = report["ended"]
    assert first == second
    assert "2 updates in a row" in first
    assert f"{name}/skipped/step-000002" in first
    assert report["agree"]
    found = {what: detail for what, _, detail in reversed(report["findings"])}  # the first of each kind
    assert found.keys() == {"weight", "module output", "log-probability", "sequence gradient", "parameter gradient"}
    assert found["module output"].startswith("rank 1:")
    weights = [(which, detail) for what, which, detail in report["findings"] if what == "weight"]
    # A replica that differs from the others is told from a weight that is infinite everywhere. (Of tensor-parallel
    # ranks the export takes rank 0's norm: that rank 1 has another one shows in its modules.)
    replica = [("model.norm.weight", "rank 1: 0 NaN and 1 infinite of 128 numbers")]
    whole = [("model.norm.weight", "0 NaN and 1 infinite of 128 numbers")]
    assert weights == {"tensor": replica, "data": replica, "pipeline": whole}[name]
