"""The order in which training takes its records: shuffled anew every epoch, resumable from a few numbers.

With several sources each has its own epochs, and the sources take turns by weight: at every prefix of the stream each
one's count is within one of its share. The turns are those of Tijdeman's algorithm (The chairman assignment problem,
Discrete Mathematics 32, 1980), which are the same on every rank and after every resume, as nothing in them is random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from perl_megatron.errors import UserError
from perl_megatron.runtime.rng import generator


class ShuffledSampler:
    """An endless stream of record indices, every index once an epoch.

    The shuffle of epoch e depends on (seed, ``stream``, e) alone, so the state is a position, not a generator's.
    """

    def __init__(self, num_records: int, seed: int, *, stream: tuple[int, ...] = ()):
        assert num_records >= 1
        self.num_records, self.seed = num_records, seed
        self.num_drawn = 0
        self._stream = stream
        self._shuffled_epoch, self._shuffle = -1, np.zeros(0, dtype=np.int64)

    @property
    def epoch(self) -> int:
        """The 0-based epoch of the next index."""
        return self.num_drawn // self.num_records

    def next(self, count: int) -> list[int]:
        """The next ``count`` indices. A call that reaches into the next epoch can hold an index twice."""
        drawn = []
        for _ in range(count):
            if self._shuffled_epoch != self.epoch:
                random = generator(self.seed, "shuffle", *self._stream, self.epoch)
                self._shuffle, self._shuffled_epoch = random.permutation(self.num_records), self.epoch
            drawn.append(int(self._shuffle[self.num_drawn % self.num_records]))
            self.num_drawn += 1
        return drawn

    def peek(self, count: int) -> list[int]:
        """What ``next`` will return; the position stays."""
        return copy.copy(self).next(count)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; JSON-serialisable."""
        return {"num_records": self.num_records, "seed": self.seed, "num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``. Raises ``UserError`` if it was saved for other data or another seed."""
        _same(state, num_records=self.num_records, seed=self.seed)
        self.num_drawn = state["num_drawn"]


class MixtureSampler:
    """An endless stream of indices into several sources that lie one behind the other.

    Args:
        sizes: records of each source.
        weights: of the sources, in any unit; None: by size, so that all end their epochs together.
        seed: of the shuffles.

    Raises:
        UserError: not one positive, finite weight for each source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
        self.sizes, self.seed = tuple(sizes), seed
        self._shares = _integer_shares(self.sizes, weights)
        self._begins = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        self._samplers = [ShuffledSampler(size, seed, stream=(number,)) for number, size in enumerate(self.sizes)]
        self._counts_before = (0,) * len(self.sizes)  # when these weights began to hold

    @property
    def num_drawn(self) -> int:
        """Indices drawn so far, of all sources."""
        return sum(sampler.num_drawn for sampler in self._samplers)

    @property
    def counts(self) -> tuple[int, ...]:
        """Indices drawn so far, of each source."""
        return tuple(sampler.num_drawn for sampler in self._samplers)

    def next(self, count: int) -> list[int]:
        """The next ``count`` indices; those of source s lie behind all records of the sources before it."""
        drawn = []
        for _ in range(count):
            drawn_since = [now - before for now, before in zip(self.counts, self._counts_before, strict=True)]
            source = _whose_turn(drawn_since, self._shares)
            drawn.append(self._begins[source] + self._samplers[source].next(1)[0])
        return drawn

    def peek(self, count: int) -> list[int]:
        """What ``next`` will return; the position stays."""
        ahead = copy.copy(self)
        ahead._samplers = [copy.copy(sampler) for sampler in self._samplers]
        return ahead.next(count)

    def state_dict(self) -> dict[str, Any]:
        """The position in each source, and what they are positions in; JSON-serialisable."""
        return {
            "sizes": list(self.sizes),
            "seed": self.seed,
            "counts": list(self.counts),
            "shares": list(self._shares),
            "counts_before": list(self._counts_before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; where the weights are others now, they hold from here on.

        Raises ``UserError`` if it was saved for other data or another seed.
        """
        _same(state, sizes=list(self.sizes), seed=self.seed)
        for sampler, count in zip(self._samplers, state["counts"], strict=True):
            sampler.num_drawn = count
        same_weights = state["shares"] == list(self._shares)
        self._counts_before = tuple(state["counts_before" if same_weights else "counts"])


def make_sampler(sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> ShuffledSampler | MixtureSampler:
    """The sampler of one source or of several ones. Raises UserError as ``MixtureSampler``."""
    if len(sizes) > 1:
        return MixtureSampler(sizes, weights, seed)
    _integer_shares(sizes, weights)
    return ShuffledSampler(sizes[0], seed)


def _integer_shares(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    """The weights as integers in the same ratios: shares are compared exactly."""
    numbers = list(sizes if weights is None else weights)
    if len(numbers) != len(sizes) or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise UserError(
            f"{len(numbers)} weights {numbers} do not say how often {len(sizes)} sources are drawn from",
            where="data.weights",
            fix="give one positive number for each path of data.train, or none at all",
        )
    exact = [Fraction(str(number)) for number in numbers]  # 0.1 is one tenth
    unit = math.lcm(*(number.denominator for number in exact))
    return tuple(int(number * unit) for number in exact)


def _whose_turn(counts: Sequence[int], shares: Sequence[int]) -> int:
    """The source of the next draw, given how often each was drawn.

    With k sources of shares λ_s = w_s / W and t draws, this one included, those are eligible with
    λ_s t − count_s ≥ 1 / (2k − 2); of these it is the one that has to be drawn soonest if its count is not to fall
    behind λ_s t by more than 1 − 1 / (2k − 2), that is by the time (count_s + 1 − 1 / (2k − 2)) / λ_s. No prefix then
    deviates from λ_s t by more than 1 − 1 / (2k − 2). All is multiplied by W (2k − 2), so that it stays in integers.
    """
    total, draws, scale = sum(shares), sum(counts) + 1, 2 * len(counts) - 2
    lags = [scale * (share * draws - count * total) for share, count in zip(shares, counts, strict=True)]
    eligible = [source for source, lag in enumerate(lags) if lag >= total]
    return min(eligible, key=lambda source: Fraction((scale * (counts[source] + 1) - 1) * total, shares[source]))


def _same(state: dict[str, Any], **expected: Any) -> None:
    where = {"seed": "run.seed"}
    for name, value in expected.items():
        if state.get(name) != value:
            saved = state.get(name, "missing: it had another number of sources")
            raise UserError(
                f"the checkpoint was saved with {name} = {saved}, but now it is {value}",
                where=where.get(name, "data.train"),
                fix="resume with the same dataset and seed, or start a new run from the exported model",
            )
