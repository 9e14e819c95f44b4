"""Mean and range over runs: `python examples/demo/table.py "permuted=runs/seed-*" "plain=runs/plain-*"` (Markdown)."""

from __future__ import annotations

import glob
import json
import sys
from pathlib import Path

ROWS = (
    ("held-out accuracy before", "accuracy_before", "{:.1%}"),
    ("held-out accuracy after", "accuracy_after", "{:.1%}"),
    ("flip rate before", "flip_rate_before", "{:.1%}"),
    ("flip rate after", "flip_rate_after", "{:.1%}"),
    ("seconds a step", "seconds_per_step", "{:.2f}"),
    ("seconds in all (training and evaluation)", "seconds_total", "{:.0f}"),
    ("peak memory, all processes (GB)", "peak_rss_gb", "{:.2f}"),
    ("mean gap of log-probabilities, engine to trainer", "logprob_gap_mean", "{:.1e}"),
    ("groups kept", "groups_kept", "{:.0f}"),
)


def main(arguments: list[str]) -> None:
    """Print one column for each NAME=PATTERN of run folders."""
    columns = dict(argument.split("=", 1) for argument in arguments)
    found = {
        name: [json.loads((Path(run) / "summary.json").read_text()) for run in sorted(glob.glob(pattern))]
        for name, pattern in columns.items()
    }
    print("| | " + " | ".join(f"{name} ({len(runs)} seeds)" for name, runs in found.items()) + " |")
    print("|---" * (len(found) + 1) + "|")
    for title, key, form in ROWS:
        cells = []
        for runs in found.values():
            # Without evaluation, or where the trainer computed no log-probabilities of its own, there is no number.
            values = [run[key] for run in runs if run[key] is not None]
            if not values:
                cells.append("not measured")
                continue
            mean, low, high = sum(values) / len(values), min(values), max(values)
            cells.append(f"{form.format(mean)} ({form.format(low)} to {form.format(high)})")
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
