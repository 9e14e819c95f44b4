"""Resampling to a target histogram of difficulty: PeRL's "rollout filtering".

PeRL answers each question ten times with the base model, and resamples the questions so that their mean accuracy falls
from 0.78 to 0.38. The target here is a histogram; what is chosen is as near to it as whole numbers and the questions at
hand allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from perl_megatron.errors import UserError


@dataclass(frozen=True)
class Resampled:
    """The chosen questions, and how near they are to the target. B bins."""

    chosen: tuple[int, ...]
    """Indices into the accuracies, ascending; with repeats, an index stands several times."""
    accuracies: tuple[float, ...]
    """[B] the accuracy that each bin stands for."""
    available: tuple[int, ...]
    """[B] questions before."""
    target: tuple[float, ...]
    """[B] the target's shares; their sum is 1."""
    counts: tuple[int, ...]
    """[B] questions chosen."""
    short: tuple[int, ...]
    """Bins that could not give their share; other bins give more instead."""
    mean_before: float
    mean_after: float


def bin_of(accuracy: float, num_bins: int) -> int:
    """The bin whose accuracy i / (num_bins - 1) is nearest; half way between two, the higher one."""
    return math.floor(accuracy * (num_bins - 1) + 0.5)


def resample(
    accuracies: Sequence[float],
    histogram: Sequence[float],
    *,
    size: int | None = None,
    allow_repeats: bool = False,
    seed: int = 0,
) -> Resampled:
    """Choose questions whose accuracies follow a histogram.

    Args:
        accuracies: of each question, between 0 and 1.
        histogram: weights of the accuracies 0, 1/(B-1), …, 1; only their proportions count.
        size: how many to choose. None: as many as there can be without a bin being short; bins without any question are
            left out of that.
        allow_repeats: choose questions several times where a bin has too few. Without it, or where a bin has none, the
            bin is short, and its share goes to the others in their proportions: no choice of this size is nearer (in
            summed absolute differences), and where all bins together have too few, it is smaller.
        seed: of the choice within bins. A larger ``size`` only adds to a bin.

    Raises:
        UserError: a histogram without weight, or no question at all.
    """
    shares = _shares(histogram)
    if not accuracies:
        raise UserError("there is no question to choose from", where="resample", fix="see what the stages dropped")
    if min(accuracies) < 0 or max(accuracies) > 1:
        raise ValueError("accuracies are between 0 and 1")
    members: list[list[int]] = [[] for _ in shares]
    for index, accuracy in enumerate(accuracies):
        members[bin_of(accuracy, len(shares))].append(index)
    available = [len(member) for member in members]
    if not any(share and count for share, count in zip(shares, available, strict=True)):
        raise UserError(
            "no question has an accuracy that the histogram wants", where="resample.histogram", fix="widen it"
        )
    if size is None:
        size = _largest_size(shares, available)
    bounds = [None if allow_repeats and count else count for count in available]
    counts = _counts(shares, bounds, size)
    chosen: list[int] = []
    for number, (member, count) in enumerate(zip(members, counts, strict=True)):
        order = np.random.default_rng([seed, number]).permutation(len(member))
        chosen += [member[order[position % len(member)]] for position in range(count)]
    chosen.sort()
    quotas = apportion(shares, size)
    return Resampled(
        chosen=tuple(chosen),
        accuracies=tuple(number / (len(shares) - 1) for number in range(len(shares))),
        available=tuple(available),
        target=tuple(float(share) for share in shares),
        counts=tuple(counts),
        short=tuple(number for number, quota in enumerate(quotas) if counts[number] < quota),
        mean_before=math.fsum(accuracies) / len(accuracies),
        mean_after=math.fsum(accuracies[index] for index in chosen) / len(chosen),
    )


def apportion(shares: Sequence[Fraction], size: int) -> list[int]:
    """``size`` in whole numbers by ``shares`` (whose sum is 1): the largest remainders are rounded up, of equal ones
    the first."""
    exact = [share * size for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: size - sum(counts)]:
        counts[number] += 1
    return counts


def _shares(histogram: Sequence[float]) -> list[Fraction]:
    bad = [weight for weight in histogram if not (math.isfinite(weight) and weight >= 0)]
    if bad or len(histogram) < 2 or not any(histogram):
        raise UserError(
            f"{list(histogram)} is no histogram",
            where="resample.histogram",
            fix="give at least two weights of 0 or more, not all of them 0",
        )
    weights = [Fraction(str(weight)) for weight in histogram]
    return [weight / sum(weights) for weight in weights]


def _normalised(shares: Sequence[Fraction], bins: set[int]) -> list[Fraction]:
    whole = sum((shares[number] for number in bins), Fraction(0))
    return [share / whole if number in bins else Fraction(0) for number, share in enumerate(shares)]


def _largest_size(shares: Sequence[Fraction], available: Sequence[int]) -> int:
    """The largest size for which no bin that has questions is short. (More is not always worse: which remainders are
    rounded up changes with the size. So it is searched from above.)"""
    wanted = {number for number, share in enumerate(shares) if share and available[number]}
    rest = _normalised(shares, wanted)
    size = math.ceil(min((available[number] + 1) / rest[number] for number in wanted))
    while any(count > bound for count, bound in zip(apportion(rest, size), available, strict=True)):
        size -= 1
    return size


def _counts(shares: Sequence[Fraction], bounds: Sequence[int | None], size: int) -> list[int]:
    """``size`` by ``shares``, at most ``bounds`` (None: no bound): bins that are short give all they have, and the rest
    is apportioned to the others, until none of them is short."""
    open_bins = {number for number, share in enumerate(shares) if share}
    counts = [0] * len(shares)
    while open_bins:
        quotas = apportion(_normalised(shares, open_bins), size - sum(counts))
        short = {n: bound for n in open_bins if (bound := bounds[n]) is not None and quotas[n] > bound}
        for number in short or open_bins:
            counts[number] = short.get(number, quotas[number])
        if not short:
            break
        open_bins -= short.keys()
    return counts
