"""Micro-batches of right-padded rows, one for each sequence: runs of a list that is ordered once.

Rows of one view, of views with common images, and of like length follow each other, so a run repeats little vision
work and pads little. The runs are those of the linear partition problem: as few as the budget allows are counted by
filling one after the other, and the least possible cost of the largest run is found by bisection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.packing import bins_per_rank, deal
from perl_megatron.batching.work import ViewWork, clusters

BISECTIONS = 12
"""Leaves the largest cost within 1/4096 of its range."""


@dataclass(frozen=True)
class _Row:
    view: int
    """Position in the caller's list."""
    member: int
    length: int
    loss: int
    """Its cost."""


class PaddedRows:
    """The rows of some views under ``vision`` or ``none`` sharing, in the order that they are cut in."""

    def __init__(self, views: Sequence[ViewWork], cost: CostModel, budget: int):
        self._views, self._cost, self._budget = views, cost, budget
        together = clusters(views) if cost.sharing == "vision" else [[position] for position in range(len(views))]
        longest = [max(view.row_lengths) for view in views]
        together.sort(key=lambda positions: -max(longest[position] for position in positions))
        self._rows = [
            _Row(position, member, views[position].prompt_tokens + tokens, cost.loss_flops(tokens))
            for positions in together
            for position in positions
            for member, tokens in enumerate(views[position].response_tokens)
        ]
        self._row_flops = {length: cost.tokens_flops(length) for length in {row.length for row in self._rows}}
        patches = {patches for view in views for _, patches in view.images}
        self._image_costs = {number: (cost.image_memory(number), cost.image_flops(number)) for number in patches}

    def plan(self, data_size: int, multiple: int) -> list[list[list[ViewWork]]]:
        """[data rank][micro-batch] → views, or parts of views."""
        runs = self._cut()
        per_rank = bins_per_rank(len(runs), data_size, multiple)
        runs = self._even(runs, per_rank * data_size)
        micro_batches = [list(self._views_of(run)) for run in runs]
        hands = deal([self._cost.flops(views).total for views in micro_batches], data_size, per_rank)
        return [[micro_batches[number] for number in hand] for hand in hands]

    def _even(self, runs: list[list[_Row]], most: int) -> list[list[_Row]]:
        """At most ``most`` runs with the largest cost as low as it gets."""
        high = max((self._cost.flops(list(self._views_of(run))).total for run in runs), default=0)
        low = sum(self._row_flops[row.length] + row.loss for row in self._rows) // most
        for _ in range(BISECTIONS):
            limit = (low + high) // 2
            found = self._cut(limit, most)
            if len(found) > most:
                low = limit
            else:
                runs, high = found, limit
        return runs

    def _cut(self, limit: float = float("inf"), most: float = float("inf")) -> list[list[_Row]]:
        """Each run as long as the budget and the cost ``limit`` allow, one row at least; stops after ``most`` + 1."""
        runs: list[list[_Row]] = []
        run: list[_Row] = []
        seen: set[str] = set()
        longest = image_memory = flops = 0
        for row in self._rows:
            more_memory, more_flops = self._images(row, run, seen)
            wide, number = max(longest, row.length), len(run) + 1
            total = number * self._row_flops[wide] + flops + row.loss + more_flops
            if not run or number * wide + image_memory + more_memory > self._budget or total > limit:
                if len(runs) > most:
                    break
                run, seen, wide, image_memory, flops = [], set(), row.length, 0, 0
                runs.append(run)
                more_memory, more_flops = self._images(row, run, seen)
            run.append(row)
            seen.update(key for key, _ in self._views[row.view].images)
            longest, image_memory, flops = wide, image_memory + more_memory, flops + row.loss + more_flops
        return runs

    def _images(self, row: _Row, run: list[_Row], seen: set[str]) -> tuple[int, int]:
        """Memory and operations of the images that a row adds to a run."""
        images: Iterator[int]
        if self._cost.sharing == "none":
            images = (patches for _, patches in self._views[row.view].images)
        elif run and run[-1].view == row.view:
            return 0, 0
        else:
            new = {key: patches for key, patches in self._views[row.view].images if key not in seen}
            images = iter(new.values())
        memory = flops = 0
        for patches in images:
            memory += self._image_costs[patches][0]
            flops += self._image_costs[patches][1]
        return memory, flops

    def _views_of(self, run: Sequence[_Row]) -> Iterator[ViewWork]:
        members: dict[int, list[int]] = {}
        for row in run:
            members.setdefault(row.view, []).append(row.member)
        for view, chosen in members.items():
            yield self._views[view].part(chosen)
