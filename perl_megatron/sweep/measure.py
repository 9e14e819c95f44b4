"""What of a run's metric rows is one number: `evaluation/accuracy`, `groups/kept:sum`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perl_megatron.errors import UserError
from perl_megatron.observability.metrics import find_metric

REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda values: values[-1],
    "first": lambda values: values[0],
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "sum": sum,
}


@dataclass(frozen=True)
class Measure:
    """A metric, and how its values of one run become one."""

    text: str
    """As it is written: the name of the table's column."""
    metric: str
    reduction: str

    @classmethod
    def read(cls, text: str, where: str) -> Measure:
        """UserError for a name that is no metric, or an unknown reduction."""
        metric, _, reduction = text.partition(":")
        if find_metric(metric) is None:
            fix = "name a column of metrics.jsonl, such as evaluation/accuracy or reward/mean"
            raise UserError(f"'{metric}' is no metric", where=where, fix=fix)
        if reduction and reduction not in REDUCTIONS:
            raise UserError(f"'{reduction}' is no reduction", where=where, fix=f"one of {', '.join(REDUCTIONS)}")
        return cls(text, metric, reduction or "last")

    def of(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """Its value in a run with these rows; None where the metric was never a finite number."""
        values = [row[self.metric] for row in rows if row.get(self.metric) is not None]
        return float(REDUCTIONS[self.reduction](values)) if values else None
