"""Order bias from a table of right and wrong answers: accuracy and flip rate, in all and by question kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class ViewOutcome:
    """Whether one answer to one record in one image order is right."""

    record_id: str
    kind: str
    """The question kind."""
    order: tuple[int, ...]
    correct: bool
    slot: int | None = None
    """0-based slot of the queried image in this order; None where the question is not about one image."""
    rollout: int = 0
    """Which of several answers to this record in this order."""
    reward: float = 0.0
    """What training would have given for the answer."""
    answered_slot: int | None = None
    """The slot that the answer names; None where answers are no images, or this one cannot be read."""


@dataclass(frozen=True)
class Rates:
    """Accuracy and flip rate of a set of views."""

    accuracy: float
    """Share of right answers over all views and rollouts."""
    flip_rate: float
    """Share of the compared records whose correctness is not the same in all orders; 0 if none was compared. With
    several rollouts, an order is correct where more than half of them are."""
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

    Every answer counts the same in an accuracy; every compared record counts the same in a flip rate.
    """
    table = list(outcomes)
    assert table, "there are no outcomes"
    seen = {(outcome.record_id, outcome.order, outcome.rollout) for outcome in table}
    assert len(seen) == len(table), "a record was evaluated twice in the same order"
    by_slot = _split(table, lambda row: row.slot)
    slots = sorted(slot for slot in by_slot if slot is not None)
    return OrderBias(
        overall=_rates(table),
        by_kind={kind: _rates(rows) for kind, rows in sorted(_split(table, lambda row: row.kind).items())},
        accuracy_by_slot={slot: _accuracy(by_slot[slot]) for slot in slots},
    )


def _rates(rows: list[ViewOutcome]) -> Rates:
    compared = flips(rows)
    return Rates(
        accuracy=_accuracy(rows),
        flip_rate=sum(compared.values()) / max(len(compared), 1),
        num_records=len({row.record_id for row in rows}),
        num_compared=len(compared),
        num_views=len({(row.record_id, row.order) for row in rows}),
    )


def flips(rows: Iterable[ViewOutcome]) -> dict[str, bool]:
    """For each record that was asked in at least two orders, whether its correctness depends on the order."""
    compared = {}
    for record_id, answers in _split(rows, lambda row: row.record_id).items():
        orders = _split(answers, lambda row: row.order)
        if len(orders) >= 2:
            compared[record_id] = len({_accuracy(views) > 0.5 for views in orders.values()}) > 1
    return compared


def _accuracy(rows: list[ViewOutcome]) -> float:
    return sum(row.correct for row in rows) / len(rows)


def _split(rows: Iterable[ViewOutcome], key: Callable[[ViewOutcome], Key]) -> dict[Key, list[ViewOutcome]]:
    parts: defaultdict[Key, list[ViewOutcome]] = defaultdict(list)
    for row in rows:
        parts[key(row)].append(row)
    return dict(parts)
