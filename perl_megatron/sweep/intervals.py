"""Means over seeds with their 95 % intervals, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# fmt: off
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
               2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)
# fmt: on
"""The 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom; for more the last one, on the safe side."""


@dataclass(frozen=True)
class MeanInterval:
    """A mean and the half width of its 95 % interval."""

    mean: float
    half_width: float
    """Infinite for a single value, of which nothing is known."""

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanInterval:
        """By Student's t: s · t_{0.975, n - 1} / √n."""
        if len(values) < 2:
            return cls(statistics.fmean(values), math.inf)
        quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
        return cls(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))

    @property
    def finite_half_width(self) -> float | None:
        """None where nothing is known, for JSON."""
        return None if math.isinf(self.half_width) else self.half_width


def paired_difference(values: Mapping[str, float], reference: Mapping[str, float]) -> MeanInterval | None:
    """Of ``values`` minus ``reference``, seed by seed, over the seeds that both have; None where there is none.

    Runs of one seed share what the seed decides, so that the difference is known better than either of its sides.
    """
    shared = sorted(values.keys() & reference.keys())
    return MeanInterval.of([values[seed] - reference[seed] for seed in shared]) if shared else None
