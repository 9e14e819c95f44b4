"""The scaling benchmark: its rows from times that are known, and its tiny jobs end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from scaling import bubble, jobs, rows_of  # noqa: E402


def test_waiting_by_theory():
    assert bubble(2, 1, 1) == 1 / 2
    assert bubble(4, 1, 8) == 3 / 11
    assert bubble(4, 2, 8) == 3 / 19


def test_ideal_times_give_ratios_of_one():
    """A job of theory: micro-batches of 0.1 s, and the pipeline's filling and draining."""
    all_jobs = jobs(quick=False)
    seconds = {}
    for name, job in all_jobs.items():
        if job.pipeline > 1:
            seconds[name] = [0.1 * (job.questions + 1 / job.chunks)]
        else:
            seconds[name] = [2.0 * max(1, job.data / 2)]
    rows = rows_of(seconds, all_jobs, cores=2)
    assert [row.ratio for row in rows] == pytest.approx([1.0] * len(rows))
    assert len(rows) == 2 + 2 * 4
    slower = {name: [2 * value[0]] if "data 2" in name else value for name, value in seconds.items()}
    ratios = {row.case: row.ratio for row in rows_of(slower, all_jobs, cores=2)}
    assert ratios["weak scaling, data 2, questions 2: an update"] == pytest.approx(2.0)


@pytest.mark.slow
def test_the_scaling_benchmark_runs(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 3
    assert all(row["ours"] > 0 for row in rows if "weak" in row["case"])
