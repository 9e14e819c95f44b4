"""What was checked, how far off it was, and how far it may be: a table for people, strict JSON for programs."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 120


@dataclass(frozen=True)
class Item:
    """One tensor or one sequence under one check."""

    name: str
    error: float
    """From the float64 reference; infinite where there is nothing to compare."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """An error that is not a number does not pass."""
        return self.error <= self.tolerance

    @property
    def share(self) -> float:
        """The error in units of the tolerance; infinite where it does not pass and cannot be expressed so."""
        if self.passed:
            return self.error / self.tolerance if self.tolerance else 0.0
        share = self.error / self.tolerance if self.tolerance else math.inf
        return math.inf if math.isnan(share) else share


@dataclass(frozen=True)
class Row:
    """One check over all its items."""

    check: str
    items: tuple[Item, ...]

    @property
    def passed(self) -> bool:
        """Every item passed, and there was one."""
        return bool(self.items) and all(item.passed for item in self.items)

    @property
    def worst(self) -> Item:
        """The item that used up most of its tolerance."""
        return max(self.items, key=lambda item: item.share, default=Item("nothing was compared", math.inf, 0.0))


@dataclass(frozen=True)
class Report:
    """The verdict on one layout."""

    layout: str
    settings: dict[str, Any]
    """The layout for JSON."""
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Every row passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """All rows with all their items; numbers that are not finite become text."""
        return {
            "passed": self.passed,
            "layout": self.layout,
            "settings": self.settings,
            "rows": [
                {
                    "check": row.check,
                    "passed": row.passed,
                    "worst": _item(row.worst),
                    "items": [_item(item) for item in row.items],
                }
                for row in self.rows
            ],
        }

    def as_json(self) -> str:
        """Strict JSON."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"

    def render(self) -> str:
        """The table, at most 120 columns wide."""
        table = Table(title=self.layout, title_justify="left")
        for name, justify in (("check", "left"), ("worst of", "right"), ("worst item", "left")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name in ("error", "tolerance", "verdict"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            worst = row.worst
            numbers = (f"{worst.error:.1e}", f"{worst.tolerance:.1e}" if worst.tolerance else "same bits")
            table.add_row(row.check, str(len(row.items)), worst.name, *numbers, "ok" if row.passed else "FAILED")
        output = io.StringIO()
        Console(file=output, width=WIDTH).print(table, highlight=False, markup=False)
        failed = [row.check for row in self.rows if not row.passed]
        verdict = f"FAILED: {', '.join(failed)}" if failed else f"equal to transformers in all {len(self.rows)} checks"
        return output.getvalue() + verdict


def _item(item: Item) -> dict[str, Any]:
    return {
        "name": item.name,
        "error": _number(item.error),
        "tolerance": _number(item.tolerance),
        "passed": item.passed,
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
