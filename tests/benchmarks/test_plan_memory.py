"""The plan's memory against a real update's: the benchmark's tiny case, which ends with a status where it is off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_planned_memory_is_measured_memory(tmp_path):
    command = [sys.executable, "benchmarks/plan_memory.py", "--quick", "--json", str(tmp_path / "rows.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    rows = {row["case"]: row["ratio"] for row in json.loads((tmp_path / "rows.json").read_text())}
    kinds, ways = ("growth", "whole", "bounds"), ("none", "full")
    assert set(rows) == {f"tiny, recompute {way}: {what}" for way in ways for what in kinds}
    assert all(abs(rows[f"tiny, recompute {way}: {what}"] - 1) <= 0.15 for way in ways for what in kinds[1:])
    # Of the growth of a tiny policy, half is what the allocator and threads keep.
    assert all(abs(rows[f"tiny, recompute {way}: growth"] - 1) <= 0.3 for way in ways)
