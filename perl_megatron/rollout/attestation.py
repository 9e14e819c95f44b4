"""Whether an engine holds what it was sent: its parameters, fused and sharded as it has them, against the stream.

An engine that reloads weights can go wrong without an error: a copy that a kernel keeps for itself stays old, a shard
lands in the wrong place, a buffer is lost while it sleeps. Rollouts are then sampled from another policy than the one
that is trained. So after every update some columns of the parameters are compared, on every rank, and now and then all
numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl_megatron.rollout.digest import as_matrix, checksum
from perl_megatron.runtime.rng import derive_seed

SAMPLED_COLUMNS = 2
"""Of each parameter and rank; every row has a number in each, so all rows of all shards are looked at."""
READ_COLUMNS = 256
"""Of a parameter, read together when all numbers are compared."""


@dataclass(frozen=True)
class Segment:
    """Rows of an engine's parameter that are rows of a published tensor (as a matrix, see ``digest``)."""

    published: str
    first_row: int
    """In the published tensor."""
    first_held_row: int
    """In the engine's parameter."""
    num_rows: int

    def of(self, held: Tensor) -> Tensor:
        """These rows of the engine's parameter, or of columns of it."""
        return held[self.first_held_row : self.first_held_row + self.num_rows]


@dataclass(frozen=True)
class Holding:
    """One parameter of an engine on this rank."""

    name: str
    """The engine's."""
    segments: tuple[Segment, ...]
    first_column: int
    """Of the published tensors' columns, the first that this rank holds."""
    num_columns: int
    read: Callable[[Tensor], Tensor]
    """(int64 [k], columns counted from this rank's first) → [rows, k], the numbers that the engine computes with."""
    is_costly: bool = False
    """Whether reading a column goes over all columns: it is then sampled after every second update."""


@dataclass(frozen=True)
class Place:
    """A part of a published tensor that a rank holds."""

    published: str
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int


class Attestor:
    """Watches the streams of weight updates, and compares what this rank holds after each.

    Args:
        holdings: all parameters of this rank.
        buffers: the engine's other tensors, which no update may change, by name.
    """

    def __init__(self, holdings: Sequence[Holding], buffers: Callable[[], Mapping[str, Tensor]]):
        self._holdings = holdings
        self._users: dict[str, list[tuple[Holding, Segment]]] = defaultdict(list)
        for holding in holdings:
            for segment in holding.segments:
                self._users[segment.published].append((holding, segment))
        self._buffers = buffers
        self._buffer_sums = self._sum_buffers()
        self._picks: dict[str, Tensor] = {}
        self._due: Sequence[Holding] = ()
        self._full = False
        self._expected: dict[tuple[str, Segment], Tensor | int] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]], *, version: int, full: bool) -> Iterator[tuple[str, Tensor]]:
        """Pass the stream of an update on, in the engine's dtype, and remember what to compare.

        ``full``: all numbers; else ``SAMPLED_COLUMNS``, others for each version, and half of the costly parameters.
        """
        self._full = full
        self._due = [each for number, each in enumerate(self._holdings) if full or _is_due(each, number + version)]
        due = {holding.name for holding in self._due}
        self._expected = {}
        for name, tensor in weights:
            matrix = as_matrix(tensor)
            for holding, segment in self._users[name]:
                if holding.name not in due:
                    continue
                rows = matrix[segment.first_row : segment.first_row + segment.num_rows]
                if full:
                    part = rows[:, holding.first_column : holding.first_column + holding.num_columns]
                    self._expected[holding.name, segment] = checksum(part, segment.first_row, holding.first_column)
                else:
                    picks = self._picks[holding.name] = _pick(holding, version)
                    self._expected[holding.name, segment] = rows[:, (picks + holding.first_column).to(rows.device)]
            yield name, tensor

    def problems(self) -> list[str]:
        """After the update: what does not hold the numbers that were sent, in words. Empty if all does."""
        found = []
        for holding in self._due:
            held = self._sums(holding) if self._full else self._samples(holding)
            found += [
                f"{segment.published}: its rows {segment.first_row} to {segment.first_row + segment.num_rows - 1}, "
                f"columns {holding.first_column} to {holding.first_column + holding.num_columns - 1}, "
                f"in the engine's {holding.name}"
                for segment in holding.segments
                if not _equal(held[segment], self._expected.get((holding.name, segment)))
            ]
        now = self._sum_buffers()
        found += [f"the buffer {name}" for name in sorted(now) if now[name] != self._buffer_sums.get(name)]
        self._expected = {}
        return found

    def sums(self) -> dict[Place, int]:
        """The checksum of each part of a published tensor that this rank holds, from the engine's own numbers."""
        found = {}
        for holding in self._holdings:
            for segment, value in self._sums(holding).items():
                found[_place(holding, segment)] = value
        return found

    def places(self) -> list[Place]:
        """What this rank holds."""
        return [_place(holding, segment) for holding in self._holdings for segment in holding.segments]

    def _samples(self, holding: Holding) -> dict[Segment, Tensor]:
        picks = self._picks.get(holding.name)
        if picks is None:
            return {segment: torch.empty(0) for segment in holding.segments}
        held = holding.read(picks)
        return {segment: segment.of(held) for segment in holding.segments}

    @staticmethod
    def _sums(holding: Holding) -> dict[Segment, int]:
        sums = dict.fromkeys(holding.segments, 0)
        for first in range(0, holding.num_columns, READ_COLUMNS):
            columns = torch.arange(first, min(first + READ_COLUMNS, holding.num_columns))
            held = holding.read(columns)
            for segment in holding.segments:
                part = segment.of(held)
                sums[segment] += checksum(part, segment.first_row, holding.first_column + first)
        return {segment: value % (1 << 64) for segment, value in sums.items()}

    def _sum_buffers(self) -> dict[str, int]:
        return {name: checksum(as_matrix(buffer)) for name, buffer in self._buffers().items() if buffer.numel()}


def uncovered(shapes: Mapping[str, Sequence[int]], places: Iterable[Place]) -> list[str]:
    """What of the published tensors ``shapes`` no rank holds, or some rank holds that is not published, in words.

    ``places`` are those of all ranks of a replica; the same part may be held by several, and parts that are not the
    same do not overlap.
    """
    held: dict[str, int] = dict.fromkeys(shapes, 0)
    problems = []
    for place in sorted(set(places), key=lambda place: (place.published, place.first_row, place.first_column)):
        if place.published not in held:
            problems.append(f"{place.published} is not among the published weights")
        else:
            held[place.published] += place.num_rows * place.num_columns
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        if held[name] != size:
            problems.append(f"{held[name]} of the {size} numbers of {name} are held")
    return problems


def add_up(sums: Iterable[Mapping[Place, int]]) -> dict[str, int]:
    """The checksum of each published tensor, from those that all ranks of a replica hold."""
    merged: dict[Place, int] = {}
    for of_rank in sums:
        merged |= of_rank
    totals: dict[str, int] = defaultdict(int)
    for place, value in merged.items():
        totals[place.published] += value
    return dict(totals)


def _place(holding: Holding, segment: Segment) -> Place:
    return Place(segment.published, segment.first_row, segment.num_rows, holding.first_column, holding.num_columns)


def _is_due(holding: Holding, turn: int) -> bool:
    return not holding.is_costly or turn % 2 == 0


def _pick(holding: Holding, version: int) -> Tensor:
    """int64 [SAMPLED_COLUMNS], columns counted from this rank's first."""
    picks = [derive_seed(version, holding.name, index) % holding.num_columns for index in range(SAMPLED_COLUMNS)]
    return torch.tensor(picks, dtype=torch.int64)


def _equal(held: Tensor | int, expected: Tensor | int | None) -> bool:
    if isinstance(held, Tensor) and isinstance(expected, Tensor):
        # Not `torch.equal`: a product that asked for a zero may have given the other one.
        return held.shape == expected.shape and bool((held == expected.to(held.device)).all())
    return isinstance(held, int) and held == expected
