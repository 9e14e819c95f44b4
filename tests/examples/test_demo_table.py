"""The table of the demo's runs, from their summaries."""

import json
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).parents[2] / "examples" / "demo" / "table.py"
NUMBERS = {
    **{"accuracy_before": 0.5, "accuracy_after": 0.75, "flip_rate_before": 0.5, "flip_rate_after": 0.25},
    **{"seconds_per_step": 2.0, "seconds_total": 60.0, "peak_rss_gb": 3.0, "groups_kept": 16},
}


def test_what_a_run_did_not_measure_is_said(tmp_path):
    """With algorithm.old_policy=engine the gap is not known; of several runs, those that know it count."""
    for name, accuracy, gap in (("a-0", 0.7, 1e-6), ("a-1", 0.8, None), ("b-0", 0.9, None)):
        (tmp_path / name).mkdir()
        summary = NUMBERS | {"accuracy_after": accuracy, "logprob_gap_mean": gap}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    columns = [f"some={tmp_path}/a-*", f"none={tmp_path}/b-*"]
    result = subprocess.run([sys.executable, TABLE, *columns], capture_output=True, text=True, check=True)
    rows = dict(line.strip("| ").split(" | ", 1) for line in result.stdout.splitlines()[2:])
    assert rows["held-out accuracy after"] == "75.0% (70.0% to 80.0%) | 90.0% (90.0% to 90.0%)"
    assert rows["mean gap of log-probabilities, engine to trainer"] == "1.0e-06 (1.0e-06 to 1.0e-06) | not measured"
