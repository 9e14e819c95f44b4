import dataclasses

import pytest
from tiny_checkpoint import make_view

from perl_megatron.rollout.shares import shares_of


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
