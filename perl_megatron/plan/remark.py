"""What is to be known about a plan, by name. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Remark:
    """Something to know about a plan."""

    name: str
    level: Literal["cannot run", "wasteful", "note"]
    text: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """As in the class."""
        return asdict(self)


def cannot_run(remarks: Sequence[Remark]) -> list[Remark]:
    """Those that say so."""
    return [remark for remark in remarks if remark.level == "cannot run"]


def name_ranks(first: int, number: int) -> str:
    """So many ranks from ``first`` on, in words."""
    return f"rank {first}" if number == 1 else f"ranks {first} to {first + number - 1}"
