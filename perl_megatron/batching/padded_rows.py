"""Micro-batches of right-padded rows, one for each sequence: runs of a list that is ordered once.

Rows of one view, of views with common images, and of like length follow each other, so a run repeats little vision
work and pads little. The runs are those of the linear partition problem: as few as the budget allows are counted by
filling one after the other, and the least possible cost of the largest run is found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.packing import bins_per_rank, deal
from perl_megatron.batching.work import ViewWork, clusters

BISECTIONS = 8
"""Leaves the largest cost within 1/256 of its range."""


class _Row(NamedTuple):
    view: int
    """Position in the caller's list."""
    member: int
    """Which of the view's sequences."""
    length: int
    loss: int
    """Its cost."""


class _Run(NamedTuple):
    start: int
    """Position of its first row."""
    cost: int


class PaddedRows:
    """The rows of some views under ``vision`` or ``none`` sharing, in the order that they are cut in."""

    def __init__(self, views: Sequence[ViewWork], cost: CostModel, budget: int):
        self._views, self._cost, self._budget = views, cost, budget
        together = clusters(views) if cost.sharing == "vision" else [[position] for position in range(len(views))]
        longest = [max(view.row_lengths) for view in views]
        together.sort(key=lambda positions: -max(longest[position] for position in positions))
        self._rows = [
            _Row(view, member, views[view].prompt_tokens + tokens, cost.loss_flops(tokens))
            for positions in together
            for view in positions
            for member, tokens in enumerate(views[view].response_tokens)
        ]
        self._row_flops = {length: cost.tokens_flops(length) for length in {row.length for row in self._rows}}
        patches = {patches for view in views for _, patches in view.images}
        self._image_costs = {number: (cost.image_memory(number), cost.image_flops(number)) for number in patches}
        self._all_images = [self._images(view, set()) for view in views]

    def plan(self, data_size: int, multiple: int) -> list[list[list[ViewWork]]]:
        """[data rank][micro-batch] → views, or parts of views."""
        runs = self._cut()
        per_rank = bins_per_rank(len(runs), data_size, multiple)
        runs = self._even(runs, per_rank * data_size)
        ends = [run.start for run in runs[1:]] + [len(self._rows)]
        micro_batches = [self._views_of(self._rows[run.start : end]) for run, end in zip(runs, ends, strict=True)]
        hands = deal([run.cost for run in runs], data_size, per_rank)
        return [[micro_batches[number] for number in hand] for hand in hands]

    def _even(self, runs: list[_Run], most: int) -> list[_Run]:
        """At most ``most`` runs with the largest cost as low as it gets."""
        high = max(run.cost for run in runs)
        low = sum(self._row_flops[row.length] for row in self._rows) // most
        for _ in range(BISECTIONS):
            limit = (low + high) // 2
            found = self._cut(limit, most)
            if len(found) > most:
                low = limit
            else:
                runs, high = found, limit
        return runs

    def _cut(self, limit: float = math.inf, most: float = math.inf) -> list[_Run]:
        """Each run as long as the budget and the cost ``limit`` allow, one row at least; stops after ``most`` + 1."""
        runs: list[_Run] = []
        share = self._cost.sharing == "vision"
        seen: set[str] = set()
        previous = -1
        start = longest = memory = flops = cost = 0
        for index, (view, _, length, loss) in enumerate(self._rows):
            if not share:
                more_memory, more_flops = self._all_images[view]
            elif view == previous:
                more_memory = more_flops = 0
            else:
                more_memory, more_flops = self._images(self._views[view], seen)
            wide = max(longest, length)
            rows = index + 1 - start
            total = rows * self._row_flops[wide] + flops + loss + more_flops
            if index and (rows * wide + memory + more_memory > self._budget or total > limit):
                runs.append(_Run(start, cost))
                if len(runs) > most:
                    return runs
                start, memory, flops, wide, seen, previous = index, 0, 0, length, set(), -1
                more_memory, more_flops = self._all_images[view]
                total = self._row_flops[wide] + loss + more_flops
            if share and view != previous:
                seen.update(key for key, _ in self._views[view].images)
            longest, memory, flops, cost, previous = wide, memory + more_memory, flops + loss + more_flops, total, view
        return [*runs, _Run(start, cost)]

    def _images(self, view: ViewWork, seen: set[str]) -> tuple[int, int]:
        """Memory and operations of the images that a sequence of the view adds to those ``seen``."""
        if self._cost.sharing == "none":
            images = [patches for _, patches in view.images]
        else:
            images = list({key: patches for key, patches in view.images if key not in seen}.values())
        costs = [self._image_costs[patches] for patches in images]
        return sum(memory for memory, _ in costs), sum(flops for _, flops in costs)

    def _views_of(self, rows: Sequence[_Row]) -> list[ViewWork]:
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(row.view, []).append(row.member)
        return [self._views[view].part(chosen) for view, chosen in members.items()]
