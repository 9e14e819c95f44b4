"""The scaling benchmark: its rows from times that are known, and its tiny jobs end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from scaling import bubble, jobs, rows_of, share_of_waiting  # noqa: E402


def test_waiting_by_theory():
    assert bubble(2, 1, 1) == 1 / 2
    assert bubble(4, 1, 8) == 3 / 11
    assert bubble(4, 2, 8) == 3 / 19


def test_a_stage_waits_where_it_is_in_no_pass():
    """Two micro-batches over two stages, by hand: of 6 s, in which passes follow each other at once, each waits 2."""
    first = [(10.0, 11.0), (11.0, 12.0), (13.0, 14.0), (15.0, 16.0)]
    second = [(11.0, 12.0), (12.0, 13.0), (13.0, 14.0), (14.0, 15.0)]
    assert share_of_waiting([first, second]) == pytest.approx(bubble(2, 1, 2))
    assert share_of_waiting([[(3.0, 4.0), (4.0, 7.0)]]) == 0


def test_ideal_times_give_ratios_of_one():
    all_jobs = jobs(quick=False)
    measured = {}
    for name, job in all_jobs.items():
        waiting = bubble(job.pipeline, job.chunks, job.questions) if job.pipeline > 1 else 0.0
        measured[name] = [{"seconds": 2.0 * max(1, job.data / 2), "waiting": waiting}]
    rows = rows_of(measured, all_jobs, cores=2)
    assert [row.ratio for row in rows] == pytest.approx([1.0] * len(rows))
    assert len(rows) == 2 + 2 * 4
    measured["data 2, questions 2"] = [{"seconds": 4.0, "waiting": 0.0}]
    ratios = {row.case: row.ratio for row in rows_of(measured, all_jobs, cores=2)}
    assert ratios["weak scaling, data 2, questions 2: an update"] == pytest.approx(2.0)


@pytest.mark.slow
def test_the_scaling_benchmark_runs(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2
    assert all(0 < row["ours"] < 1 for row in rows if "waiting" in row["case"])
    assert all(row["ours"] > 0 for row in rows)
