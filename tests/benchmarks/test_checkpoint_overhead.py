"""The benchmark of checkpoints, from end to end; its figures depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "checkpoint_overhead.py"


@pytest.mark.slow
def test_runs_with_and_without_checkpoints_are_compared(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["case"].split(":")[0], row["peer"]) for row in rows] == [
        *[("asynchronous", "no checkpoints")] * 2,
        *[("synchronous", "no checkpoints")] * 2,
        ("training stands still for a checkpoint", "synchronous"),
    ]
    assert [row["goal"] for row in rows] == [1.02, None, None, None, None]
    assert all(row["ours"] > 0 and row["peer_value"] > 0 for row in rows)
