"""Order bias from a table of right and wrong answers: accuracy and flip rate, in all and by question kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class ViewOutcome:
    """Whether one record was answered right in one image order."""

    record_id: str
    kind: str
    """The question kind."""
    order: tuple[int, ...]
    correct: bool
    slot: int | None = None
    """0-based slot of the queried image in this order; None where the question is not about one image."""


@dataclass(frozen=True)
class Rates:
    """Accuracy and flip rate of a set of views."""

    accuracy: float
    """Share of right answers over all views."""
    flip_rate: float
    """Share of the compared records whose correctness is not the same in all orders; 0 if none was compared."""
    num_records: int
    num_compared: int
    """Records that were asked in at least two orders: the only ones that can flip."""
    num_views: int


@dataclass(frozen=True)
class OrderBias:
    """The outcome of an evaluation in several image orders."""

    overall: Rates
    by_kind: Mapping[str, Rates] = field(default_factory=dict)
    accuracy_by_slot: Mapping[int, float] = field(default_factory=dict)
    """Accuracy over the views whose queried image stands in this 0-based slot: flat without a positional bias."""

    @property
    def accuracy(self) -> float:
        """Of all views."""
        return self.overall.accuracy

    @property
    def flip_rate(self) -> float:
        """Of all records."""
        return self.overall.flip_rate

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the keys of ``accuracy_by_slot`` become strings."""
        values = asdict(self)
        values["accuracy_by_slot"] = {str(slot): rate for slot, rate in self.accuracy_by_slot.items()}
        return values


def order_bias(outcomes: Iterable[ViewOutcome]) -> OrderBias:
    """Accuracy and flip rate over all views, by kind, and accuracy by the queried image's slot.

    Every view counts the same in an accuracy; every compared record counts the same in a flip rate.
    """
    table = list(outcomes)
    assert table, "there are no outcomes"
    seen = {(outcome.record_id, outcome.order) for outcome in table}
    assert len(seen) == len(table), "a record was evaluated twice in the same order"
    by_slot = _split(table, lambda row: row.slot)
    slots = sorted(slot for slot in by_slot if slot is not None)
    return OrderBias(
        overall=_rates(table),
        by_kind={kind: _rates(rows) for kind, rows in sorted(_split(table, lambda row: row.kind).items())},
        accuracy_by_slot={slot: _accuracy(by_slot[slot]) for slot in slots},
    )


def _rates(rows: list[ViewOutcome]) -> Rates:
    records = _split(rows, lambda row: row.record_id)
    compared = [{row.correct for row in views} for views in records.values() if len(views) >= 2]
    return Rates(
        accuracy=_accuracy(rows),
        flip_rate=sum(len(answers) > 1 for answers in compared) / max(len(compared), 1),
        num_records=len(records),
        num_compared=len(compared),
        num_views=len(rows),
    )


def _accuracy(rows: list[ViewOutcome]) -> float:
    return sum(row.correct for row in rows) / len(rows)


def _split(rows: Iterable[ViewOutcome], key: Callable[[ViewOutcome], Key]) -> dict[Key, list[ViewOutcome]]:
    parts: defaultdict[Key, list[ViewOutcome]] = defaultdict(list)
    for row in rows:
        parts[key(row)].append(row)
    return dict(parts)
