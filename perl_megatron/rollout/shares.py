"""Who samples which views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from perl_megatron.types import View


def shares_of(views: Sequence[View], num_shares: int) -> list[list[int]]:
    """The views of each share, by index: neighbouring views of one record together, where there are enough records.

    Views of a record share images, whose features an engine computes once.
    """
    blocks = record_blocks(views)
    if len(blocks) < num_shares:
        blocks = [[index] for index in range(len(views))]
    edges = [len(blocks) * share // num_shares for share in range(num_shares + 1)]
    return [[index for block in blocks[first:end] for index in block] for first, end in pairwise(edges)]


def record_blocks(views: Sequence[View]) -> list[list[int]]:
    """Neighbouring views of one record, by index."""
    blocks: list[list[int]] = []
    for index, view in enumerate(views):
        if blocks and view.record_id == views[index - 1].record_id:
            blocks[-1].append(index)
        else:
            blocks.append([index])
    return blocks
