"""A run in a few numbers: `summary.json`, and the table that is printed from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from perl_megatron.observability.json_lines import write_text

GB_PER_GIB = 2**30 / 1e9


def summarize(
    rows: Sequence[Mapping[str, Any]], *, engine: str, layout: str, seconds_total: float, peak_rss_gib: float = 0.0
) -> dict[str, Any]:
    """The summary of a run from its metric rows (`metrics.jsonl`); None where a number was never logged.

    `layout` is a line such as 'tensor 2 × pipeline 1 × context 1 × data 1'; `seconds_total` is the wall time of the
    run, everything included; `peak_rss_gib` counts beside the logged peaks (an earlier start of the run may have had a
    higher one).
    Before is the first evaluation, after is the last one.
    """
    accuracy = _values(rows, "evaluation/accuracy")
    flip_rate = _values(rows, "evaluation/flip_rate")
    reasons = sorted({name for row in rows for name in row if name.startswith("groups/dropped_")})
    return {
        "accuracy_before": accuracy[0] if accuracy else None,
        "accuracy_after": accuracy[-1] if accuracy else None,
        "flip_rate_before": flip_rate[0] if flip_rate else None,
        "flip_rate_after": flip_rate[-1] if flip_rate else None,
        "steps": max((row["step"] for row in rows), default=0),
        "seconds_total": seconds_total,
        "seconds_per_step": _mean(_values(rows, "seconds/step")),
        "peak_rss_gb": max([*_values(rows, "memory/peak_rss_gib"), peak_rss_gib]) * GB_PER_GIB or None,
        "logprob_gap_mean": _mean(_values(rows, "logprob_gap/mean")),
        "groups_kept": round(sum(_values(rows, "groups/kept"))),
        "groups_dropped": {name.removeprefix("groups/dropped_"): round(sum(_values(rows, name))) for name in reasons},
        "engine": engine,
        "layout": layout,
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON, whole or not at all."""
    write_text(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a run."""
    return json.loads(path.read_text(encoding="utf-8"))


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) as a person reads it."""
    dropped = ", ".join(f"{reason} {count}" for reason, count in summary["groups_dropped"].items()) or "none"
    return [
        ("held-out accuracy, before → after", _change(summary["accuracy_before"], summary["accuracy_after"])),
        ("flip rate, before → after", _change(summary["flip_rate_before"], summary["flip_rate_after"])),
        ("steps", str(summary["steps"])),
        ("time", f"{summary['seconds_total']:.0f} s, {_show(summary['seconds_per_step'], '{:.2f} s')} a step"),
        ("peak memory, all processes", _show(summary["peak_rss_gb"], "{:.2f} GB")),
        ("engine against trainer, mean |Δ log-probability|", _show(summary["logprob_gap_mean"], "{:.2e}")),
        ("groups kept", str(summary["groups_kept"])),
        ("groups dropped", dropped),
        ("engine", summary["engine"]),
        ("layout", summary["layout"]),
    ]


def summary_table(summary: Mapping[str, Any], *, title: str) -> Table:
    """The summary for a terminal."""
    table = Table(title=title, show_header=False)
    for what, value in summary_rows(summary):
        table.add_row(what, value)
    return table


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _show(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)


def _change(before: float | None, after: float | None) -> str:
    return f"{_show(before, '{:.1%}')} → {_show(after, '{:.1%}')}"
