"""How far a number may be from the expected one."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from perl_megatron.types import Grading


@dataclass(frozen=True)
class Tolerance:
    """Two bounds, of which one suffices; both are inclusive, and 0 means exactly equal."""

    absolute: Fraction
    relative: Fraction
    """As a share of the expected number."""

    def allows(self, given: Fraction, expected: Fraction) -> bool:
        """Whether ``given`` is close enough. Exact: no rounding decides."""
        return abs(given - expected) <= max(self.absolute, self.relative * abs(expected))


def tolerance_of(grading: Grading) -> Tolerance:
    """The record's tolerances, as the decimals that the record shows: 0.1 is one tenth."""
    return Tolerance(Fraction(str(grading.absolute_tolerance)), Fraction(str(grading.relative_tolerance)))
