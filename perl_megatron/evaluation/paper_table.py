"""The results in the form of PeRL's tables, its published rows beside ours.

Published: PeRL (arXiv 2506.14907, NeurIPS 2025), main table and ablation of n_s at 12 rollouts a question;
Qwen2.5-VL-7B, greedy, 2048 new tokens; no error bars. All means are recomputed here: the paper prints 47.90 for its
base model, but its eight numbers have the mean 46.80. (Its PeRL row has 43.38 for ReMI, its n_s = 1 row 41.65; the
other seven numbers are the same.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from perl_megatron.errors import UserError
from perl_megatron.evaluation.benchmark_results import read_results

COLUMNS = {
    "mantis_eval": "Mantis-Eval",
    "blink": "BLINK",
    "mmiu": "MMIU",
    "math_vista": "MathVista",
    "math_verse": "MathVerse",
    "math_vision": "MathVision",
    "remi": "ReMI",
    "mv_math": "MV-MATH",
}
MISSING = "–"


@dataclass(frozen=True)
class ResultRow:
    """One model: accuracies in percent by benchmark; those that were not measured are missing."""

    name: str
    values: Mapping[str, float]
    half_widths: Mapping[str, float]
    """Half the width of the 95 % interval, in points, where it is known."""

    @property
    def mean(self) -> float | None:
        """Over all eight benchmarks; None unless all are there."""
        if set(self.values) != set(COLUMNS):
            return None
        return sum(self.values.values()) / len(COLUMNS)


def _published(name: str, *values: float) -> ResultRow:
    return ResultRow(name, dict(zip(COLUMNS, values, strict=True)), {})


PUBLISHED = (
    _published("base (paper)", 70.80, 55.23, 52.00, 68.20, 46.30, 25.07, 36.38, 20.41),
    _published("PeRL (paper)", 76.39, 58.53, 54.23, 73.00, 49.56, 28.26, 43.38, 25.68),
    _published("n_s=0, n=12 (paper)", 75.93, 56.91, 52.26, 71.80, 49.20, 26.51, 39.62, 24.02),
    _published("n_s=1, n=6 (paper)", 76.39, 58.53, 54.23, 73.00, 49.56, 28.26, 41.65, 25.68),
    _published("n_s=2, n=4 (paper)", 77.78, 59.50, 54.55, 72.20, 50.38, 27.89, 39.04, 24.54),
    _published("n_s=3, n=3 (paper)", 74.07, 57.02, 52.17, 70.90, 46.39, 27.00, 38.62, 23.25),
)


def own_row(path: Path) -> ResultRow:
    """The row of one finished evaluation, named after its model or folder. UserError where it is none."""
    content = read_results(path)
    values, half_widths = {}, {}
    for name, result in content["benchmarks"].items():
        if name not in COLUMNS:
            raise UserError(f"the benchmark {name!r} is not in the paper's table", where=str(path))
        if result["limit"] is not None and result["whole"]["num_questions"] < result["num_published"]:
            continue  # of a trial with evaluation.max_records: not the benchmark's accuracy
        estimate = result[result["headline"]]
        values[name] = 100 * estimate["value"]
        half_widths[name] = 50 * (estimate["high"] - estimate["low"])
    folder = path if path.is_dir() else path.parent
    return ResultRow(folder.name.removesuffix(".benchmarks"), values, half_widths)


def cells(row: ResultRow) -> tuple[str, ...]:
    """Name, eight accuracies and the mean as texts."""
    shown = []
    for name in COLUMNS:
        if name not in row.values:
            shown.append(MISSING)
        elif name in row.half_widths:
            shown.append(f"{_two_decimals(row.values[name])} ± {_two_decimals(row.half_widths[name])}")
        else:
            shown.append(_two_decimals(row.values[name]))
    return row.name, *shown, MISSING if row.mean is None else _two_decimals(row.mean)


def render(rows: Sequence[ResultRow]) -> Table:
    """For a terminal."""
    table = Table("", *COLUMNS.values(), "mean", title="Accuracy in % (± half of the 95 % interval; means recomputed)")
    for index, row in enumerate(rows):
        table.add_row(*map(escape, cells(row)), end_section=index == len(PUBLISHED) - 1)
    return table


def markdown(rows: Sequence[ResultRow]) -> str:
    """For a file."""
    lines = ["| | " + " | ".join((*COLUMNS.values(), "mean")) + " |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    note = "Accuracy in %, ± half of the 95 % bootstrap interval. All means are recomputed (the paper prints 47.90 for "
    return "\n".join(lines) + f"\n\n{note}its base model); {MISSING}: not measured.\n"


def _two_decimals(value: float) -> str:
    """Rounded half up as a person does: the mean 50.735 is no float, and the one beside it is below."""
    return str(Decimal(str(round(value, 8))).quantize(Decimal("0.01"), rounding=ROUND_HALF_UP))
