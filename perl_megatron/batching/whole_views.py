"""Micro-batches of whole views, each prompt once: clusters of views with common images, or single views, into bins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from perl_megatron.batching.cost import CostModel, step_flops
from perl_megatron.batching.packing import Bins, Item, balance, bins_per_rank, deal, fewest, first_fit
from perl_megatron.batching.work import ViewWork, clusters

Numbers = list[list[list[int]]]
"""[data rank][micro-batch] → numbers of pieces."""


class WholeViews:
    """Pieces are views, or parts of views that alone are above the budget.

    Costs of items that are put into one bin are added up; images that they have in common are then counted twice, so
    nothing gets over the budget. Only between whole plans the exact cost decides.
    """

    def __init__(self, views: Sequence[ViewWork], cost: CostModel, budget: int):
        self._views, self._cost, self._budget = views, cost, budget
        self._images = {
            (key, patches): (cost.image_memory(patches), cost.image_flops(patches))
            for view in views
            for key, patches in view.images
        }
        self._origins = [(position, members) for position, view in enumerate(views) for members in self._divide(view)]
        self._pieces = [views[position].part(members) for position, members in self._origins]
        self._tokens = [cost.view_tokens(piece) for piece in self._pieces]
        self._flops = [cost.view_flops(piece) for piece in self._pieces]
        self._alone = [self._item([number]) for number in range(len(self._pieces))]

    def plan(self, data_size: int, stages: int, multiple: int) -> list[list[list[ViewWork]]]:
        """[data rank][micro-batch] → views, or parts of views.

        There are as many micro-batches as first-fit needs; those of first-fit are one plan, and often the only one
        where they are nearly full.
        """
        candidates = [self._whole_clusters(), self._alone]
        if len(candidates[0]) == len(self._alone):
            candidates.pop()
        densest = min((first_fit(items, self._budget) for items in candidates), key=len)
        per_rank = bins_per_rank(len(densest), data_size, multiple)
        plans = [plan for items in candidates for plan in self._plans(items, data_size, per_rank)]
        plans.append(_dealt(densest, data_size, per_rank))
        best = min(plans, key=lambda plan: step_flops(self._costs(plan), stages))
        return [[list(self._views_of(numbers)) for numbers in rank if numbers] for rank in best]

    def _plans(self, items: list[Item], data_size: int, per_rank: int) -> Iterator[Numbers]:
        """Ranks first balances the ranks best, where it finds room; bins first finds room more often."""
        ranks = balance(items, data_size, per_rank * self._budget)
        filled = [balance(rank, per_rank, self._budget) for rank in ranks or []]
        complete = [bins for bins in filled if bins is not None]
        if len(complete) == data_size:
            yield [[_members(items) for items in bins] for bins in complete]
        bins = balance(items, data_size * per_rank, self._budget)
        if bins is not None:
            yield _dealt(bins, data_size, per_rank)

    def _costs(self, plan: Numbers) -> list[list[int]]:
        return [[self._item(numbers).cost for numbers in rank] for rank in plan]

    def _item(self, numbers: Sequence[int], *, parts: bool = False) -> Item:
        """Some pieces in one bin; a single one above the budget takes a bin of its own."""
        images = dict.fromkeys(image for number in numbers for image in self._pieces[number].images)
        size = sum(self._tokens[number] for number in numbers) + sum(self._images[image][0] for image in images)
        return Item(
            cost=sum(self._flops[number] for number in numbers) + sum(self._images[image][1] for image in images),
            size=min(size, self._budget),
            members=tuple(numbers),
            parts=tuple(self._alone[number] for number in numbers) if parts else (),
        )

    def _whole_clusters(self) -> list[Item]:
        """Each cluster as one item; one above the budget as runs of its pieces."""
        pieces_of: list[list[int]] = [[] for _ in self._views]
        for number, (position, _) in enumerate(self._origins):
            pieces_of[position].append(number)
        items = []
        for positions in clusters(self._views):
            run: list[int] = []
            images: set[tuple[str, int]] = set()
            size = 0
            for number in (number for position in positions for number in pieces_of[position]):
                new = set(self._pieces[number].images) - images
                more = self._tokens[number] + sum(self._images[image][0] for image in new)
                if run and size + more > self._budget:
                    items.append(self._item(run, parts=len(run) > 1))
                    run, images, size = [], set(), 0
                    more = self._alone[number].size
                run.append(number)
                images.update(self._pieces[number].images)
                size += more
            items.append(self._item(run, parts=len(run) > 1))
        return items

    def _divide(self, view: ViewWork) -> list[tuple[int, ...]]:
        """The sequences of a view that go together: all, or fewest parts of like cost that fit the budget."""
        everyone = tuple(range(len(view.sequence_indices)))
        memory = self._cost.memory([view])
        if memory <= self._budget or len(everyone) == 1:
            return [everyone]
        sizes = [max(tokens - 1, 0) for tokens in view.response_tokens]
        room = self._budget - memory + sum(sizes)
        costs = [self._cost.response_flops(view.prompt_tokens, tokens) for tokens in view.response_tokens]
        fitting = [Item(costs[member], sizes[member], (member,)) for member in everyone if sizes[member] <= room]
        parts = [_members(items) for items in fewest(fitting, room)]
        too_long = [[member] for member in everyone if sizes[member] > room]
        return sorted(map(tuple, parts + too_long))

    def _views_of(self, numbers: Sequence[int]) -> Iterator[ViewWork]:
        """In the caller's order; parts of a view that met again are one."""
        members: dict[int, list[int]] = {}
        for number in sorted(numbers):
            position, own = self._origins[number]
            members.setdefault(position, []).extend(own)
        for position, chosen in members.items():
            yield self._views[position].part(chosen)


def _dealt(bins: Bins, data_size: int, per_rank: int) -> Numbers:
    hands = deal([sum(item.cost for item in items) for items in bins], data_size, per_rank)
    return [[_members(bins[number]) for number in hand] for hand in hands]


def _members(items: Sequence[Item]) -> list[int]:
    return sorted(member for item in items for member in item.members)
