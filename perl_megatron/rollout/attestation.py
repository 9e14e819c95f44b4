"""Whether an engine holds what it was sent: its parameters, fused and sharded as it has them, against the stream.

An engine that reloads weights can go wrong without an error: a copy that a kernel keeps for itself stays old, a shard
lands in the wrong place, a buffer is lost while it sleeps. Rollouts are then sampled from another policy than the one
that is trained. So after every update some columns of the parameters are compared, on every rank, and now and then all
numbers.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl_megatron.errors import UserError
from perl_megatron.rollout.digest import as_matrix, checksum, comparable
from perl_megatron.runtime.rng import derive_seed

SAMPLED_COLUMNS = 2
"""Of each parameter and rank; every row has a number in each, so all rows of all shards are looked at."""
SAMPLED_BUFFER_ROWS = 64
"""Of a buffer, every so many."""
TURNS = 4
"""Updates after which every parameter was looked at, where reading one is costly."""
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
    """Whether reading a column goes over all columns: it is then sampled after one of ``TURNS`` updates."""


@dataclass(frozen=True)
class Place:
    """A part of a published tensor that a rank holds: what ranks tell each other of a segment of a holding."""

    published: str
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int

    def overlaps(self, other: Place) -> bool:
        """Whether both, of one tensor, have a number in common."""
        rows = self.first_row < other.first_row + other.num_rows and other.first_row < self.first_row + self.num_rows
        before = self.first_column + self.num_columns <= other.first_column
        behind = other.first_column + other.num_columns <= self.first_column
        return rows and not before and not behind


@dataclass(frozen=True)
class _Sent:
    """What was sent of a segment: some columns, or the checksum of all."""

    numbers: Tensor | int
    all_finite: bool = True
    """Of what a checksum was made of."""

    def is_finite(self) -> bool:
        """Neither NaN nor infinity, as far as it is known."""
        return bool(self.numbers.isfinite().all()) if isinstance(self.numbers, Tensor) else self.all_finite


class Attestor:
    """Watches the streams of weight updates, and compares what this rank holds after each.

    Args:
        holdings: all parameters of this rank.
        buffers: the engine's other tensors, which no update may change, by name.
    """

    def __init__(self, holdings: Sequence[Holding], buffers: Callable[[], Mapping[str, Tensor]]):
        self._holdings = holdings
        self._holders: dict[str, list[tuple[Holding, Segment]]] = defaultdict(list)
        """Of each published tensor."""
        for holding in holdings:
            for segment in holding.segments:
                self._holders[segment.published].append((holding, segment))
        self._buffers = buffers
        self._buffer_sums = {full: self._sum_buffers(full=full) for full in (False, True)}
        self._columns: dict[str, Tensor] = {}
        """By holding, those that are compared after this update."""
        self._due: Sequence[Holding] = ()
        """What is compared after this update."""
        self._due_names: frozenset[str] = frozenset()
        self._num_updates = 0
        self._full = False
        self._sent: dict[tuple[str, Segment], _Sent] = {}
        self.watch_seconds = 0.0
        """What watching the last stream took, beside the stream."""

    def watch(self, weights: Iterable[tuple[str, Tensor]], *, version: int, full: bool) -> Iterator[tuple[str, Tensor]]:
        """Pass the stream of an update on, in the engine's dtype, and remember what to compare: see ``expect``."""
        self.expect(version=version, full=full)
        for name, tensor in weights:
            self.see(name, tensor)
            yield name, tensor

    def expect(self, *, version: int, full: bool) -> None:
        """A stream begins, whose tensors ``see`` will be shown.

        ``full``: all numbers are compared; else ``SAMPLED_COLUMNS``, others for each version, and of the costly
        parameters only those whose turn it is.
        """
        self._full, self._sent, self.watch_seconds = full, {}, 0.0
        self._due = [each for number, each in enumerate(self._holdings) if full or self._is_due(each, number)]
        self._num_updates += 1
        if not full:
            self._columns = {holding.name: _pick_columns(holding, version) for holding in self._due}
        self._due_names = frozenset(holding.name for holding in self._due)

    def see(self, name: str, tensor: Tensor) -> None:
        """Remember what to compare of a published tensor, in the engine's dtype."""
        begin = time.perf_counter()
        for holding, segment in self._holders.get(name, ()):
            if holding.name in self._due_names:
                self._sent[holding.name, segment] = self._remember(as_matrix(tensor), holding, segment)
        self.watch_seconds += time.perf_counter() - begin

    def _is_due(self, holding: Holding, number: int) -> bool:
        return not holding.is_costly or (number + self._num_updates) % TURNS == 0

    def _remember(self, matrix: Tensor, holding: Holding, segment: Segment) -> _Sent:
        rows = matrix[segment.first_row : segment.first_row + segment.num_rows]
        if self._full:
            part = rows[:, holding.first_column : holding.first_column + holding.num_columns]
            return _Sent(checksum(part, segment.first_row, holding.first_column), bool(part.isfinite().all()))
        part = rows[:, (self._columns[holding.name] + holding.first_column).to(rows.device)]
        return _Sent(part)

    def problems(self) -> list[str]:
        """After the update: what does not hold the numbers that were sent, in words. Empty if all does."""
        found = []
        for holding in self._due:
            held = self._sums(holding) if self._full else self._samples(holding)
            for segment in holding.segments:
                sent = self._sent.get((holding.name, segment))
                if sent is None or not _equal(held[segment], sent.numbers):
                    found.append(_describe(holding, segment, sent))
        now, before = self._sum_buffers(full=self._full), self._buffer_sums[self._full]
        found += [f"the buffer {name}" for name in sorted(now) if now[name] != before.get(name)]
        self._sent = {}
        return found

    def sums(self) -> list[tuple[Place, int]]:
        """The checksum of each part of a published tensor that this rank holds, from the engine's own numbers.

        A part that two parameters hold comes twice.
        """
        return [
            (_place(holding, segment), value)
            for holding in self._holdings
            for segment, value in self._sums(holding).items()
        ]

    def places(self) -> list[Place]:
        """What this rank holds."""
        return [_place(holding, segment) for holding in self._holdings for segment in holding.segments]

    def _samples(self, holding: Holding) -> dict[Segment, Tensor]:
        held = holding.read(self._columns[holding.name])
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

    def _sum_buffers(self, *, full: bool) -> dict[str, int]:
        """Of all rows, or of every ``SAMPLED_BUFFER_ROWS``th: tables of rotary angles are large."""
        step = 1 if full else SAMPLED_BUFFER_ROWS
        filled = {name: buffer for name, buffer in self._buffers().items() if buffer.numel()}
        return {name: checksum(as_matrix(buffer)[::step]) for name, buffer in filled.items()}


def uncovered(shapes: Mapping[str, Sequence[int]], places: Iterable[Place]) -> list[str]:
    """What of the published tensors ``shapes`` no rank holds, or some rank holds that is not published, in words.

    ``places`` are those of all ranks of a replica; several may hold the same part.
    """
    held: dict[str, list[Place]] = {name: [] for name in shapes}
    problems = []
    for place in dict.fromkeys(places):
        if place.published not in held:
            problems.append(f"{place.published} is not among the published weights")
            continue
        others = held[place.published]
        problems += [f"{place} and {other} overlap" for other in others if place.overlaps(other)]
        others.append(place)
    for name, shape in shapes.items():
        size, number = torch.Size(shape).numel(), sum(place.num_rows * place.num_columns for place in held[name])
        if number != size:
            problems.append(f"{number} of the {size} numbers of {name} are held")
    return problems


def add_up(sums: Iterable[tuple[Place, int]]) -> dict[str, int]:
    """The checksum of each published tensor, from those that all ranks hold.

    Raises:
        UserError: two that hold the same part of a tensor hold different numbers.
    """
    merged: dict[Place, int] = {}
    for place, value in sums:
        if merged.setdefault(place, value) != value:
            raise UserError(
                f"two copies of {place} differ", where="rollout.engine", fix="its weights have to be brought again"
            )
    totals: dict[str, int] = defaultdict(int)
    for place, value in merged.items():
        totals[place.published] += value
    return dict(totals)


def without_raising(find_problems: Callable[[], list[str]]) -> list[str]:
    """An error is a problem too: a rank that raised alone would leave the others waiting for it."""
    try:
        return find_problems()
    except Exception as error:
        return [f"what vLLM holds could not be read: {type(error).__name__}: {error}"]


def _place(holding: Holding, segment: Segment) -> Place:
    return Place(segment.published, segment.first_row, segment.num_rows, holding.first_column, holding.num_columns)


def _pick_columns(holding: Holding, version: int) -> Tensor:
    """int64 [SAMPLED_COLUMNS], counted from this rank's first."""
    columns = [derive_seed(version, holding.name, index) % holding.num_columns for index in range(SAMPLED_COLUMNS)]
    return torch.tensor(columns, dtype=torch.int64)


def _equal(held: Tensor | int, sent: Tensor | int) -> bool:
    if isinstance(held, Tensor) and isinstance(sent, Tensor):
        sent = sent.to(held.device)
        return held.shape == sent.shape and bool((comparable(held) == comparable(sent)).all())
    return isinstance(held, int) and held == sent


def _describe(holding: Holding, segment: Segment, sent: _Sent | None) -> str:
    where = (
        f"{segment.published}: its rows {segment.first_row} to {segment.first_row + segment.num_rows - 1}, columns "
        f"{holding.first_column} to {holding.first_column + holding.num_columns - 1}, in the engine's {holding.name}"
    )
    if sent is None:
        return f"{where} (nothing was sent)"
    return where if sent.is_finite() else f"{where} (what was sent is not finite: the policy itself is broken)"
