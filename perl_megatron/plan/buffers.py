"""What megatron-core allocates beside the parameters: gradient buffers, and the optimizer's state. Exact; no torch.

megatron-core 0.16, distributed/param_and_grad_buffer.py: a model chunk's trained parameters lie in one buffer in the
reverse of their order. With the distributed optimizer each begins at a multiple of 64 numbers, and a bucket ends at a
multiple of the data-parallel size and of 128; a bucket is the whole buffer (gradient reduction is not overlapped), but
that a tied embedding in several stages has one of its own. Each data-parallel rank (context ranks count) optimizes its
equal part of each bucket, and the parameters move into a buffer of the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perl_megatron.plan.parameters import Parameter

PARAMETER_START = 64
BUCKET_END = 128


@dataclass(frozen=True)
class Bucket:
    """A part of a buffer that is reduced in one collective."""

    start: int
    end: int
    parameters: tuple[tuple[int, int], ...]
    """Where each parameter of it starts and ends in the buffer."""


def buckets(parameters: Sequence[Parameter], data_size: int, *, distributed: bool) -> list[Bucket]:
    """The buckets of a chunk's buffer, of its trained parameters in the order of ``named_parameters``."""
    found: list[Bucket] = []
    inside: list[tuple[int, int]] = []
    start = end = 0

    def close() -> None:
        nonlocal start, end, inside
        if inside:
            stop = _ceil(end, math.lcm(data_size, BUCKET_END)) if distributed else end
            found.append(Bucket(start, stop, tuple(inside)))
            start = end = stop
            inside = []

    for one in reversed(parameters):
        own_bucket = one.is_shared_embedding and distributed
        if own_bucket:
            end = _ceil(end, PARAMETER_START)
            close()
        first = _ceil(end, PARAMETER_START) if distributed else end
        end = first + one.count
        inside.append((first, end))
        if own_bucket:
            close()
    close()
    return found


def buffer_size(found: Sequence[Bucket]) -> int:
    """Numbers in the whole buffer."""
    return found[-1].end if found else 0


def optimized_count(found: Sequence[Bucket], data_rank: int, data_size: int, *, distributed: bool) -> int:
    """Numbers that a data-parallel rank optimizes: its parts of the parameters, or all of them."""
    if not distributed:
        return sum(end - start for bucket in found for start, end in bucket.parameters)
    total = 0
    for bucket in found:
        part = (bucket.end - bucket.start) // data_size
        low = bucket.start + data_rank * part
        total += sum(max(0, min(end, low + part) - max(start, low)) for start, end in bucket.parameters)
    return total


def largest_optimized(found: Sequence[Bucket], data_size: int, *, distributed: bool) -> int:
    """That of the rank with most: padding at the ends of buckets falls to the last ranks."""
    ranks = {0, data_size // 2, data_size - 1} if distributed else {0}
    return max(optimized_count(found, rank, data_size, distributed=distributed) for rank in ranks)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
