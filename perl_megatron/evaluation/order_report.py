"""The order-bias report: how much a policy's answers depend on the order of the images, and where.

- accuracy and flip rate by question kind, with bootstrap intervals over questions;
- accuracy by image order (orders of sets with the same number of images are comparable);
- the split of the reward's variance (``variance.py``);
- slots: how well questions about the image in each slot are answered, and how often each slot is named as the answer
  against how often it is the answer. Slots are told apart by the number of images: the fourth of four images is the
  last one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from perl_megatron.evaluation.bootstrap import Answer, Estimate, bootstrap
from perl_megatron.evaluation.order_bias import OrderBias, ViewOutcome, flips, order_bias
from perl_megatron.evaluation.variance import RewardCase, VarianceSplit, split_variance

NUM_WORST = 5
MAX_ORDERS = 24
"""Orders that the terminal's table lists for each number of images; the JSON has all."""


@dataclass(frozen=True)
class OrderRow:
    """All answers in one image order."""

    num_images: int
    order: tuple[int, ...]
    """``order[new_slot] = old_slot``, 0-based."""
    num_answers: int
    accuracy: float


@dataclass(frozen=True)
class SlotRow:
    """All answers to questions about the image in one slot, of sets with so many images."""

    num_images: int
    slot: int
    """0-based."""
    num_answers: int
    accuracy: float | None
    """None where no question was about this slot."""
    expected_share: float | None
    """How often this slot was the answer; None where answers are no images."""
    answered_share: float | None
    """How often this slot was named; above ``expected_share`` the policy prefers it."""


@dataclass(frozen=True)
class OrderReport:
    """All of it."""

    bias: OrderBias
    accuracy: Estimate
    flip_rate: Estimate | None
    """None where no question was asked in two orders."""
    by_order: tuple[OrderRow, ...]
    slots: tuple[SlotRow, ...]
    variance: VarianceSplit

    def worst_slots(self) -> list[SlotRow]:
        """The slots with the lowest accuracies."""
        measured = [row for row in self.slots if row.accuracy is not None]
        return sorted(measured, key=lambda row: (row.accuracy, row.num_images, row.slot))[:NUM_WORST]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and the plot."""
        return {
            "accuracy": self.accuracy.value,
            "accuracy_interval": [self.accuracy.low, self.accuracy.high],
            "flip_rate": self.bias.flip_rate,
            "flip_rate_interval": None if self.flip_rate is None else [self.flip_rate.low, self.flip_rate.high],
            "overall": asdict(self.bias.overall),
            "by_kind": {kind: asdict(rates) for kind, rates in self.bias.by_kind.items()},
            "by_order": [asdict(row) for row in self.by_order],
            "slots": [asdict(row) for row in self.slots],
            "worst_slots": [asdict(row) for row in self.worst_slots()],
            "variance": asdict(self.variance),
        }

    def write(self, path: Path) -> None:
        """Write the JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def render(self) -> Group:
        """Tables for a terminal."""
        tables = (self._overall(), self._orders(), self._slots(), self._variance())
        return Group(*(table for table in tables if table.row_count))

    def _overall(self) -> Table:
        table = Table("", "value", "95 % interval", title="All questions")
        for name, estimate in (("accuracy", self.accuracy), ("flip rate", self.flip_rate)):
            if estimate is not None:
                table.add_row(name, f"{estimate.value:.1%}", f"{estimate.low:.1%} - {estimate.high:.1%}")
        return table

    def _orders(self) -> Table:
        table = Table("images", "order", "answers", "accuracy", title="Accuracy by image order")
        shown: defaultdict[int, int] = defaultdict(int)
        for row in self.by_order:
            shown[row.num_images] += 1
            if row.num_images > 1 and shown[row.num_images] <= MAX_ORDERS:
                order = " ".join(str(slot + 1) for slot in row.order)
                table.add_row(str(row.num_images), order, str(row.num_answers), f"{row.accuracy:.1%}")
        return table

    def _slots(self) -> Table:
        table = Table("images", "slot", "answers", "accuracy", "expected", "answered", title="Slots, worst first")
        rows = sorted(self.slots, key=lambda row: (row.accuracy is None, row.accuracy))
        for row in rows:
            shares = (row.accuracy, row.expected_share, row.answered_share)
            cells = ("–" if share is None else f"{share:.1%}" for share in shares)
            table.add_row(str(row.num_images), str(row.slot + 1), str(row.num_answers), *cells)
        return table

    def _variance(self) -> Table:
        split = self.variance
        table = Table("between", "sum of squares", "share", "variance", title="Where the reward varies")
        for name, part in (("questions", "question"), ("orders of a question", "order"), ("rollouts", "sampling")):
            squares, component = getattr(split, f"{part}_squares"), getattr(split, f"{part}_variance")
            share = squares / split.total_squares if split.total_squares else 0.0
            table.add_row(name, f"{squares:.3f}", f"{share:.1%}", "–" if component is None else f"{component:.4f}")
        return table


def order_report(outcomes: Sequence[ViewOutcome], *, greedy: bool, seed: int) -> OrderReport:
    """The report of an evaluation in several orders. ``greedy``: answers do not vary within an order."""
    compared = flips(outcomes)
    kinds = {outcome.record_id: outcome.kind for outcome in outcomes}
    answers = [Answer(row.kind, row.record_id, float(row.correct)) for row in outcomes]
    flipped = [Answer(kinds[record], record, float(flip)) for record, flip in compared.items()]
    return OrderReport(
        bias=order_bias(outcomes),
        accuracy=bootstrap(answers, seed=seed).micro,
        flip_rate=bootstrap(flipped, seed=seed).micro if flipped else None,
        by_order=_by_order(outcomes),
        slots=_slot_rows(outcomes),
        variance=split_variance((RewardCase(row.record_id, row.order, row.reward) for row in outcomes), greedy=greedy),
    )


def _by_order(outcomes: Sequence[ViewOutcome]) -> tuple[OrderRow, ...]:
    """Most asked first, by number of images."""
    table: defaultdict[tuple[int, ...], list[bool]] = defaultdict(list)
    for outcome in outcomes:
        table[outcome.order].append(outcome.correct)
    rows = [OrderRow(len(order), order, len(right), sum(right) / len(right)) for order, right in table.items()]
    return tuple(sorted(rows, key=lambda row: (row.num_images, -row.num_answers, row.order)))


def _slot_rows(outcomes: Sequence[ViewOutcome]) -> tuple[SlotRow, ...]:
    by_size: defaultdict[int, list[ViewOutcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.slot is not None:
            by_size[len(outcome.order)].append(outcome)
    rows = []
    for num_images, about in sorted(by_size.items()):
        named = [outcome for outcome in about if outcome.answered_slot is not None]
        for slot in range(num_images):
            right = [outcome.correct for outcome in about if outcome.slot == slot]
            rows.append(
                SlotRow(
                    num_images=num_images,
                    slot=slot,
                    num_answers=len(right),
                    accuracy=sum(right) / len(right) if right else None,
                    expected_share=sum(row.slot == slot for row in named) / len(named) if named else None,
                    answered_share=sum(row.answered_slot == slot for row in named) / len(named) if named else None,
                )
            )
    return tuple(rows)
