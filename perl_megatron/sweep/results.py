"""What a sweep found: one row for each point, with means over the seeds, as a table, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from perl_megatron.config.sweep_domain import ARM, Choice
from perl_megatron.config.sweep_file import Sweep
from perl_megatron.sweep.intervals import MeanInterval, paired_difference
from perl_megatron.sweep.storage import point_of
from perl_megatron.sweep.worker import VALUES

RUNNING_STATES = (TrialState.RUNNING, TrialState.WAITING)


@dataclass(frozen=True)
class PointResult:
    """One point of the sweep."""

    point: int
    state: str
    """'complete', 'pruned', 'running', 'waiting' or 'failed'."""
    params: Mapping[str, Choice]
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metric → seed → last value of that run."""
    steps: int | None = None
    """How far it came, in the pruner's count."""
    last: float | None = None
    """The value that it was pruned at."""
    attempts: int = 1
    """Trials of this point: each interruption adds one."""

    def interval(self, metric: str) -> MeanInterval | None:
        """Over the seeds; None where nothing was measured."""
        values = list(self.values.get(metric, {}).values())
        return MeanInterval.of(values) if values else None


def read_results(sweep: Sweep, study: optuna.Study) -> list[PointResult]:
    """Every point: the complete ones first, best first, then those that were pruned, then the others."""
    attempts: dict[int, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        attempts.setdefault(point_of(trial), []).append(trial)
    metric, sign = sweep.sweep.metric, -1 if sweep.sweep.direction == "maximize" else 1
    results = [_result(point, trials) for point, trials in attempts.items()]
    order = ("complete", "pruned", "running", "waiting", "failed")

    def place(result: PointResult) -> tuple[int, float, int]:
        interval = result.interval(metric)
        value = interval.mean if result.state == "complete" and interval is not None else result.last
        return order.index(result.state), math.inf if value is None else sign * value, result.point

    return sorted(results, key=place)


def reference_of(sweep: Sweep, results: Sequence[PointResult]) -> PointResult | None:
    """The complete point that others are compared with: the arm of sweep.reference, or the best point."""
    complete = [result for result in results if result.state == "complete"]
    if sweep.sweep.reference is None:
        return complete[0] if complete else None
    return next((result for result in complete if result.params.get(ARM) == sweep.sweep.reference), None)


def table_rows(sweep: Sweep, results: Sequence[PointResult]) -> list[dict[str, Any]]:
    """A row for each point: numbers, for CSV and JSON. None where nothing is known."""
    reference = reference_of(sweep, results)
    rows = []
    for result in results:
        row: dict[str, Any] = {"point": result.point, "state": result.state, **result.params}
        row |= {"attempts": result.attempts, "steps": result.steps, "pruned_at": result.last}
        row["num_seeds"] = len(result.values.get(sweep.sweep.metric, {}))
        for metric in (sweep.sweep.metric, *sweep.sweep.measures):
            interval, gap = result.interval(metric), None
            if reference is not None and result is not reference:
                gap = paired_difference(result.values.get(metric, {}), reference.values.get(metric, {}))
            row[metric], row[f"{metric} ±"] = _numbers(interval)
            row[f"{metric} difference"], row[f"{metric} difference ±"] = _numbers(gap)
        rows.append(row)
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated, with a head; unknown numbers are empty."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(sweep: Sweep, results: Sequence[PointResult]) -> str:
    """The rows, and every seed's value."""
    seeds = {result.point: result.values for result in results}
    content = {
        "sweep": sweep.sweep.name,
        "metric": sweep.sweep.metric,
        "direction": sweep.sweep.direction,
        "points": [{**row, "values": seeds[row["point"]]} for row in table_rows(sweep, results)],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def to_markdown(sweep: Sweep, results: Sequence[PointResult]) -> str:
    """The table for a person: means ± 95 % intervals, and paired differences from the reference."""
    params = [domain.name for domain in sweep.space]
    metrics = (sweep.sweep.metric, *sweep.sweep.measures)
    head = ["point", *params, "seeds", *(text for metric in metrics for text in (metric, "difference")), "state"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in table_rows(sweep, results):
        cells = [str(row["point"]), *(shown(row.get(name)) for name in params), str(row["num_seeds"])]
        for metric in metrics:
            cells += [_show_interval(row, metric), _show_interval(row, f"{metric} difference", sign="+")]
        state = row["state"]
        if state == "pruned":
            state += f" after {row['steps']} steps at {row['pruned_at']:.4g}"
        lines.append(f"| {' | '.join([*cells, state])} |")
    return "\n".join(lines) + "\n"


def _result(point: int, trials: Sequence[FrozenTrial]) -> PointResult:
    trial = trials[-1]
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    state = states.get(trial.state, trial.state.name.lower())
    measured = trial.user_attrs.get(VALUES, {})
    values = {name: {seed: v for seed, v in seeds.items() if v is not None} for name, seeds in measured.items()}
    return PointResult(
        point=point,
        state=state,
        params=trial.params,
        values=values,
        steps=trial.last_step,
        last=trial.value if state == "pruned" else None,
        attempts=len(trials),
    )


def _numbers(interval: MeanInterval | None) -> tuple[float | None, float | None]:
    if interval is None:
        return None, None
    return interval.mean, interval.finite_half_width


def _show_interval(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    if row[name] is None:
        return ""
    half = row[f"{name} ±"]
    return f"{row[name]:{sign}.4f} ± {'?' if half is None else f'{half:.4f}'}"


def shown(value: Choice) -> str:
    """A parameter's value for a person."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
