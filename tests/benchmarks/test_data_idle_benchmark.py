"""The benchmark of steps that wait for images, from end to end; its figures depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "data_idle.py"


@pytest.mark.slow
def test_runs_that_decode_ahead_and_as_needed_are_compared(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    rows = {
        (row["case"].split(":")[1].strip(), row["peer"]): row
        for row in json.loads((tmp_path / "rows.json").read_text())
    }
    waits = rows["idle in a step", "no process"]
    # Which of them waits less three steps beside other tests do not say: tests/data/test_processor.py and
    # tests/data/test_images_ahead.py have what is decoded where.
    assert waits["ours"] > 0
    assert waits["peer_value"] > 0
    shares = rows["idle share", "no process"]
    assert rows["idle share", "bound"]["ours"] == shares["ours"]
    assert 0 < shares["ours"] < 1
    assert 0 < shares["peer_value"] < 1
    (needed,) = [row for (_, peer), row in rows.items() if peer == "a step's (calculated)"]
    assert needed["case"].startswith("3b: an image, of ")
    assert needed["goal"] == 1.0
    assert needed["peer_value"] > 0
