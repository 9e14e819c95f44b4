"""Things of different cost and size into bins. Deterministic: ties go to the first thing and the first bin.

The algorithms are the textbook ones: longest processing time first (R. L. Graham, "Bounds on multiprocessing timing
anomalies", 1969), here with bins of limited room, and first-fit decreasing (D. S. Johnson, 1973).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Item:
    """Something that goes into one bin as a whole, or in its parts where no bin has room for it."""

    cost: int
    size: int
    """Room that it takes."""
    members: tuple[int, ...]
    """What it consists of, as the caller numbers it; not empty, and no two items have a member in common."""
    parts: tuple[Item, ...] = ()


Bins = list[list[Item]]


def balance(items: Sequence[Item], num_bins: int, capacity: int) -> Bins | None:
    """Items into ``num_bins`` bins of like cost, none of them over ``capacity``; None where one finds no room.

    Longest processing time first: items by descending cost, each into the bin of least cost that has room. Where
    room is no matter, the bin of highest cost has at most 4/3 − 1/(3 · num_bins) of the least possible.
    """
    queue = [(-item.cost, item.members, item) for item in items]
    heapq.heapify(queue)
    bins: Bins = [[] for _ in range(num_bins)]
    costs, room = np.zeros(num_bins), np.full(num_bins, capacity, dtype=np.int64)
    while queue:
        item = heapq.heappop(queue)[-1]
        fits = room >= item.size
        if fits.any():
            chosen = int(np.where(fits, costs, np.inf).argmin())
            bins[chosen].append(item)
            costs[chosen] += item.cost
            room[chosen] -= item.size
        elif item.parts:
            for part in item.parts:
                heapq.heappush(queue, (-part.cost, part.members, part))
        else:
            return None
    return bins


def first_fit(items: Sequence[Item], capacity: int) -> Bins:
    """Items into few bins: by descending size, each into the first bin that has room. No item is above ``capacity``.

    Any two bins together hold more than ``capacity``, and the bins are at most 11/9 of the fewest, and one.
    """
    bins: Bins = []
    room = np.full(len(items), capacity, dtype=np.int64)
    for item in sorted(items, key=lambda item: (-item.size, item.members)):
        chosen = int((room >= item.size).argmax())
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(item)
        room[chosen] -= item.size
    return bins


def fewest(items: Sequence[Item], capacity: int) -> Bins:
    """Items into as few bins as ``first_fit`` finds, of like cost where ``balance`` finds room."""
    packed = first_fit(items, capacity)
    return balance(items, len(packed), capacity) or packed


def deal(costs: Sequence[int], hands: int, most: int) -> list[list[int]]:
    """Things to ``hands`` of like cost, at most ``most`` to each: the positions of their costs."""
    dealt = balance([Item(cost, 1, (position,)) for position, cost in enumerate(costs)], hands, most)
    assert dealt is not None, f"{len(costs)} things for {hands} hands of {most}"
    return [[item.members[0] for item in hand] for hand in dealt]


def bins_per_rank(num_bins: int, data_size: int, multiple: int) -> int:
    """The least number of bins for each rank, a multiple of ``multiple`` above 0, that makes ``num_bins`` in all."""
    return max(1, -(-num_bins // (data_size * multiple))) * multiple
