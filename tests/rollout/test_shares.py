import dataclasses

import pytest
from tiny_checkpoint import make_view

from perl_megatron.rollout.shares import record_blocks, shares_of


def views_of(*sizes):
    """So many views of each record."""
    view = make_view([])
    return [
        dataclasses.replace(view, record_id=str(record), index=index)
        for record, size in enumerate(sizes)
        for index in range(size)
    ]


@pytest.mark.parametrize(
    ("sizes", "num_replicas", "expected"),
    [
        ((2, 2, 2, 2), 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ((2, 2, 2, 2), 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((2, 3, 1), 2, [[0, 1], [2, 3, 4, 5]]),
        ((4,), 2, [[0, 1], [2, 3]]),
        ((1,), 2, [[], [0]]),
        ((), 2, [[], []]),
    ],
)
def test_views_of_a_record_stay_together(sizes, num_replicas, expected):
    assert shares_of(views_of(*sizes), num_replicas) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((), []), ((1,), [[0]]), ((2, 1, 3), [[0, 1], [2], [3, 4, 5]])],
)
def test_blocks_are_the_neighbouring_views_of_a_record(sizes, expected):
    assert record_blocks(views_of(*sizes)) == expected


def test_a_record_that_comes_again_later_is_another_block():
    """Its images may be out of the caches by then, and the order stays."""
    a, b = views_of(1, 1)
    assert record_blocks([a, a, b, a]) == [[0, 1], [2], [3]]
