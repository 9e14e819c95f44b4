"""How far a party's log-probabilities may be from the reference's: what rounding alone does to the reference.

    allowed = ``MULTIPLE`` · |reference in the party's precision − exact reference|
              + ``FLOOR`` · last place of the largest log-probability in float32, as which it is recorded

The exact reference is a precision above the party's: float64 for float32, float32 for bfloat16. ``MULTIPLE``: two
correct programs round at other places. Two numbers have to be small enough: the largest gap of a token, held against
the largest error of all tokens; and the mean gap of a response, held against the largest mean error of as many tokens
in a row. The mean tells apart what single tokens, whose rounding errors differ widely, do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MULTIPLE = 4.0
FLOOR = 1.0
HALVES = 0.5
"""A hypothesis also has to bring the mean gap of a rollout to at most this share: one that changes less than the gap
would else pass where the gap is barely too large."""


def gap(recorded: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """float64 [R]: |recorded − reference| of each token, to the nearest of K alternatives [R, K].

    Infinite where the recorded number is not finite or the reference excludes the token; NaN where the reference says
    nothing.
    """
    distances = np.abs(recorded[:, None] - reference)
    distances = np.where(np.isnan(reference), np.nan, np.where(np.isnan(distances), np.inf, distances))
    return distances.min(axis=1)


class Tolerance:
    """What rounding allows.

    Args:
        errors: of the rounded reference against the exact one, float64 [R] for each rollout.
        largest: the largest finite |log-probability| of the exact reference.
    """

    def __init__(self, errors: Sequence[np.ndarray], *, largest: float):
        joined = np.concatenate(list(errors))
        # A token that rounding moves out of the nucleus says nothing about the size of rounding errors.
        self._errors = joined[np.isfinite(joined)]
        self._floor = FLOOR * float(np.finfo(np.float32).eps) * largest

    def largest(self) -> float:
        """Of one token."""
        return self.mean(1)

    def mean(self, num_tokens: int | None = None) -> float:
        """Of ``num_tokens`` in a row; None: of all."""
        if len(self._errors) == 0:
            return self._floor
        count = len(self._errors) if num_tokens is None else max(1, min(num_tokens, len(self._errors)))
        sums = np.concatenate([[0.0], np.cumsum(self._errors)])
        return MULTIPLE * float(np.max(sums[count:] - sums[:-count])) / count + self._floor

    def holds(self, gaps: np.ndarray) -> bool:
        """Whether the gaps of one rollout, [R], are rounding; those that are NaN are left out."""
        known = gaps[~np.isnan(gaps)]
        if len(known) == 0:
            return False
        return bool(known.max() <= self.largest() and known.mean() <= self.mean(len(known)))


def explains(tolerance: Tolerance, gaps: np.ndarray, plain: np.ndarray) -> bool:
    """Whether a hypothesis reproduces a rollout, gaps [R], that the right input and weights, ``plain``, do not."""
    return tolerance.holds(gaps) and bool(np.nanmean(gaps) <= HALVES * np.nanmean(plain))


@dataclass(frozen=True)
class Side:
    """What is known of one rollout for the hint."""

    num_images: int
    permuted: bool
    gaps: np.ndarray
    mismatched: bool


def where_it_begins(sides: Sequence[Side], tolerance: Tolerance) -> str:
    """Which rollouts are affected, and from which token on, in words; empty without a mismatch."""
    wrong = [side for side in sides if side.mismatched]
    if not wrong:
        return ""

    def share(name: str, members: list[Side]) -> str:
        return f"{sum(side.mismatched for side in members)} of {len(members)} {name}"

    views = [
        share("original views", [side for side in sides if not side.permuted]),
        share("permuted views", [side for side in sides if side.permuted]),
    ]
    counts = sorted({side.num_images for side in sides})
    images = [share(f"with {count} images", [side for side in sides if side.num_images == count]) for count in counts]
    above = [np.flatnonzero(side.gaps > tolerance.largest()) for side in wrong]
    first = [int(tokens[0]) for tokens in above if len(tokens)]
    begins = "no single token is beyond rounding, but the mean is"
    if first:
        at_once = f"{sum(token == 0 for token in first)} of {len(wrong)}"
        begins = f"the gap begins at the response's first token in {at_once}, at token {max(first)} at the latest"
    return "; ".join([", ".join(views), ", ".join(images), begins])
