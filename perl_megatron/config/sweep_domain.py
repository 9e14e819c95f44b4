"""What a sweep varies: one domain for each config field, or `arm`, whose choices are named sets of settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from perl_megatron.config.yaml_source import dump_scalar

Choice = None | bool | int | float | str
"""What Optuna stores of a choice."""
ARM = "arm"


@dataclass(frozen=True)
class Domain:
    """The values of one parameter."""

    name: str
    """The config field's dotted key, or `arm`."""
    kind: Literal["choice", "int", "float"]
    choices: Mapping[Choice, tuple[str, ...]] = field(default_factory=dict)
    """'choice': the settings that each value stands for."""
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    points: int | None = None

    def overrides(self, value: Choice) -> tuple[str, ...]:
        """The settings of a run at this value."""
        return self.choices[value] if self.kind == "choice" else (f"{self.name}={dump_scalar(value)}",)

    def samples(self) -> list[Choice]:
        """Values that stand for all others where settings are checked: every choice, or both bounds."""
        return list(self.choices) if self.kind == "choice" else [self._number(self.low), self._number(self.high)]

    def grid(self) -> list[Choice] | None:
        """All values of a grid; None where an interval does not say which."""
        if self.kind == "choice":
            return list(self.choices)
        if self.points is not None:
            return self._spaced(self.points)
        if self.log or (self.step is None and self.kind == "float"):
            return None
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self._number(self.low + index * step) for index in range(count)]

    def describe(self) -> dict[str, object]:
        """JSON, the same for the same domain: workers of one sweep compare it."""
        choices = [[value, list(settings)] for value, settings in self.choices.items()]
        return {
            "name": self.name,
            "kind": self.kind,
            **({"choices": choices} if choices else {"low": self.low, "high": self.high, "step": self.step}),
            **({} if choices else {"log": self.log, "points": self.points}),
        }

    def _spaced(self, count: int) -> list[Choice]:
        shares = [index / (count - 1) for index in range(count)]
        if self.log:
            values = [math.exp(math.log(self.low) * (1 - share) + math.log(self.high) * share) for share in shares]
        else:
            values = [self.low * (1 - share) + self.high * share for share in shares]
        # Ten digits are enough, and 1.0000000000000002e-05 is no one's learning rate; but the bounds are exact.
        inner = [float(f"{value:.10g}") for value in values[1:-1]]
        numbers: list[Choice] = [self._number(value) for value in (self.low, *inner, self.high)]
        return list(dict.fromkeys(numbers))

    def _number(self, value: float) -> int | float:
        return round(value) if self.kind == "int" else float(value)


def grid_points(space: Sequence[Domain]) -> list[dict[str, Choice]] | None:
    """All combinations; None where an interval does not say which values it has."""
    grids = {domain.name: domain.grid() for domain in space}
    values = [grid for grid in grids.values() if grid is not None]
    if len(values) < len(grids):
        return None
    return [dict(zip(grids, combination, strict=True)) for combination in itertools.product(*values)]
