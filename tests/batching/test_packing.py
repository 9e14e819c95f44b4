import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.batching.packing import Item, balance, bins_per_rank, deal, fewest, first_fit

ANY_ROOM = 10**6


def items_of(costs, sizes=None):
    sizes = sizes or [1] * len(costs)
    return [Item(cost, size, (number,)) for number, (cost, size) in enumerate(zip(costs, sizes, strict=True))]


def members(bins):
    return [[member for item in items for member in item.members] for items in bins]


def least_possible(costs, num_bins):
    """By trying all."""
    return min(
        max(sum(cost for cost, bin_ in zip(costs, chosen, strict=True) if bin_ == number) for number in range(num_bins))
        for chosen in itertools.product(range(num_bins), repeat=len(costs))
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(2, 3))
def test_the_largest_bin_is_within_grahams_bound(costs, num_bins):
    bins = balance(items_of(costs), num_bins, ANY_ROOM)
    largest = max(sum(item.cost for item in items) for items in bins)
    assert 3 * num_bins * largest <= (4 * num_bins - 1) * least_possible(costs, num_bins)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12), st.integers(1, 4), st.integers(9, 30))
def test_everything_is_in_one_bin_and_no_bin_is_over_its_room(pairs, num_bins, capacity):
    items = items_of([cost for cost, _ in pairs], [size for _, size in pairs])
    packed = first_fit(items, capacity)
    for bins in (balance(items, num_bins, capacity), packed, fewest(items, capacity)):
        if bins is not None:
            assert sorted(itertools.chain(*members(bins))) == list(range(len(items)))
            assert all(sum(item.size for item in items) <= capacity for items in bins)
    sizes = sorted(sum(item.size for item in items) for items in packed)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > capacity
    assert len(fewest(items, capacity)) == len(packed)
    assert (balance(items, num_bins, capacity) is None) <= (sum(size for _, size in pairs) + 9 * num_bins > capacity)


def test_ties_go_to_the_first():
    assert members(balance(items_of([5, 5, 5, 5]), 2, ANY_ROOM)) == [[0, 2], [1, 3]]
    assert members(balance(items_of([1, 4, 2]), 2, ANY_ROOM)) == [[1], [2, 0]]


def test_a_bin_without_room_is_passed_over():
    assert members(balance(items_of([9, 2, 2, 1], [1, 2, 2, 2]), 2, 4)) == [[0, 3], [1, 2]]


def test_what_finds_no_room_is_split():
    halves = [Item(3, 3, (2,)), Item(3, 3, (3,))]
    items = [Item(9, 5, (0,)), Item(9, 5, (1,)), Item(5, 6, (2, 3), parts=tuple(halves))]
    assert members(balance(items, 2, 8)) == [[0, 2], [1, 3]]
    assert balance(items, 2, 7) is None
    assert members(balance(items, 3, 8)) == [[0], [1], [2, 3]]


def test_few_bins_come_before_like_cost():
    """Longest processing time first leaves no room for the last one in two bins; first-fit finds it."""
    items = items_of([4, 4, 3, 3, 2], [4, 4, 3, 3, 2])
    assert balance(items, 2, 8) is None
    assert members(fewest(items, 8)) == [[0, 1], [2, 3, 4]]
    assert members(fewest(items, 9)) == [[0, 2, 4], [1, 3]]
    assert fewest([], 5) == []


def test_hands_have_at_most_so_many_bins():
    assert deal([9, 1, 1, 1], 2, 2) == [[0, 3], [1, 2]]
    assert deal([9, 1, 1], 2, 2) == [[0], [1, 2]]
    assert deal([], 3, 1) == [[], [], []]


def test_the_costliest_goes_first_to_the_hand_with_least():
    assert deal([1, 5, 3, 3, 1], 2, 5) == [[1, 0, 4], [2, 3]]
    assert deal([2, 2, 2], 3, 3) == [[0], [1], [2]]
    assert deal([7], 3, 1) == [[0], [], []]


@pytest.mark.parametrize(
    ("num_bins", "data_size", "multiple", "per_rank"), [(0, 2, 1, 1), (0, 2, 4, 4), (5, 2, 1, 3), (5, 2, 2, 4)]
)
def test_bins_of_a_rank(num_bins, data_size, multiple, per_rank):
    assert bins_per_rank(num_bins, data_size, multiple) == per_rank
