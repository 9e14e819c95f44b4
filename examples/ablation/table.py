"""The ablation's table and plot: `python examples/ablation/table.py [--plot docs/ablation.png]` (Markdown).

Means over the seeds with 95 % intervals (Student's t), and the differences from the reference arm, seed by seed: runs
of one seed share data, warm start and held-out questions, so a difference is known better than either of its sides.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from run import HERE, RUNS, run_name

REFERENCE = "n_s = 1 (paper)"
MEASURES = {"accuracy_after": "held-out accuracy", "flip_rate_after": "flip rate"}
# fmt: off
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
               2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)
# fmt: on
"""The 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % interval."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """By Student's t; of a single value nothing is known."""
        if len(values) < 2:
            return cls(statistics.fmean(values), math.inf)
        quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
        return cls(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))

    def show(self, sign: str = "") -> str:
        """In percentage points."""
        return f"{self.mean:{sign}.1%} ± {self.half_width:.1%}".replace("inf%", "?")


def read_runs(runs: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Arm → seed → summary, of the runs that are finished."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for arm in yaml.safe_load((HERE / "arms.yaml").read_text()):
        paths = runs.glob(run_name(arm, 0)[:-1] + "*/summary.json")
        summaries = {int(path.parent.name.rpartition("-")[2]): json.loads(path.read_text()) for path in paths}
        if summaries:
            found[arm] = dict(sorted(summaries.items()))
    return found


def column(runs: dict[int, dict[str, float]], measure: str) -> Interval:
    """Over the seeds."""
    return Interval.of([summary[measure] for summary in runs.values()])


def difference(
    runs: dict[int, dict[str, float]], reference: dict[int, dict[str, float]], measure: str
) -> Interval | None:
    """Of the seeds that both have; None where there is none."""
    shared = sorted(runs.keys() & reference.keys())
    pairs = [runs[seed][measure] - reference[seed][measure] for seed in shared]
    return Interval.of(pairs) if pairs else None


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown."""
    titles = [text for name in MEASURES.values() for text in (name, "difference")]
    lines = ["| arm | seeds | " + " | ".join(titles) + " | groups trained on |", "|---" * 7 + "|"]
    reference = found.get(REFERENCE, {})
    before = {seed: summary for runs in found.values() for seed, summary in runs.items()}
    start = [column(before, measure.replace("after", "before")).show() for measure in MEASURES]
    lines.append(f"| before training | {len(before)} | {start[0]} | | {start[1]} | | |")
    for arm, runs in found.items():
        cells = []
        for measure in MEASURES:
            gap = None if arm == REFERENCE else difference(runs, reference, measure)
            cells += [column(runs, measure).show(), "" if gap is None else gap.show("+")]
        kept = statistics.fmean(summary["groups_kept"] for summary in runs.values())
        lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + f" | {kept:.0f} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Every run as a point, the mean with its interval beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(11, 0.6 * len(found) + 1.4), sharey=True, dpi=80)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for row, runs in enumerate(found.values()):
            interval = column(runs, measure)
            values = [100 * summary[measure] for summary in runs.values()]
            axis.plot(values, [row - 0.15] * len(values), "o", color="tab:gray", markersize=4, alpha=0.6)
            half = 0 if math.isinf(interval.half_width) else 100 * interval.half_width
            axis.errorbar(100 * interval.mean, row + 0.1, xerr=half, fmt="s", color="tab:blue", capsize=4)
        axis.set_xlabel(f"{title} (%)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Print the table; draw the plot where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of the runs")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    options = parser.parse_args()
    found = read_runs(options.runs)
    if not found:
        raise SystemExit(f"error: there are no finished runs in {options.runs}\n  fix: python {HERE / 'run.py'}")
    print(table(found))
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
