"""Distributed optimizers' states on their way into a checkpoint: each rank gets what it writes, in small pieces.

megatron-core 0.16.1, optimizer/distrib_optimizer.py: ``get_parameter_state_dp_zero`` gathers the states of all data-
parallel ranks on every one of them. On a GPU a whole gradient buffer is gathered at a time, in float32, beside a copy
of the rank's own part: 30 GB for 3.75 billion parameters on one device, which an update does not leave. In host memory
every rank then holds 12 bytes a number of its model part, and a node of eight replicas eight times that. Here the
states are zeros at first, which take no memory before they are written to. Once it is known which parameters a rank
will write, those alone are brought, ``PIECE_BYTES`` at a time.

It also packs the buckets of a buffer without the padding at their ends, and ``sharded_param_state_fully_reshardable``
cuts parameters out at places that count the padding. So where a buffer has a second bucket (a tied embedding over
several pipeline stages has one), all parameters behind the first padding would be saved as their neighbours' values.
Here all lies where the buffer has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from perl_megatron.runtime import platform

PIECE_BYTES = 256 << 20
"""Of a state, that all data-parallel ranks together bring at a time. On the device of each, with what it sends."""
_STATES = ("param", "exp_avg", "exp_avg_sq")
_KEYS = "optimizer.state."
"""What the keys of optimizer states begin with."""


@dataclass(frozen=True)
class _Buffer:
    """The states of the parameters of one gradient buffer, laid out as it."""

    optimizer: DistributedOptimizer
    index: int
    """Which of the optimizer's buffers."""
    states: dict[str, Tensor]
    """float32 [the buffer's size] each, on the CPU."""


class GatheredStates:
    """The states in the description that megatron-core has made of an optimizer; zeros until ``fill``."""

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []

    @classmethod
    @contextmanager
    def described(cls, optimizer: MegatronOptimizer) -> Iterator[GatheredStates]:
        """Those that are described within the block; none where the optimizer is not a distributed one."""
        states, parts = cls(), getattr(optimizer, "chained_optimizers", [optimizer])
        distributed = [part for part in parts if isinstance(part, DistributedOptimizer)]
        for part in distributed:
            part.get_parameter_state_dp_zero = partial(states._describe, part)
        try:
            yield states
        finally:
            for part in distributed:
                del part.get_parameter_state_dp_zero  # it would keep the states

    def _describe(self, optimizer: DistributedOptimizer, **options: Any) -> dict[Any, Any]:
        """In place of the optimizer's method, in whose form the answer is."""
        described: dict[Any, Any] = {"buckets_coalesced": True}
        for index, of_dtypes in enumerate(optimizer.gbuf_ranges):
            buffer = optimizer.buffers[index]
            # numpy leaves zeros to the operating system; torch writes them, and would take all the memory at once.
            states = {name: torch.from_numpy(np.zeros(buffer.numel, np.float32)) for name in _STATES}
            self._buffers.append(_Buffer(optimizer, index, states))
            described[index] = {dtype: {**states, "numel_unpadded": buffer.numel_unpadded} for dtype in of_dtypes}
        return described

    def are_own(self, key: str) -> bool:
        """Whether the part of a checkpoint with this key is of what was filled: memory that no update changes."""
        return bool(self._buffers) and key.startswith(_KEYS)

    def fill(self, sharded: Any) -> None:
        """Bring the states that this rank writes of ``sharded``, a description with main replicas. Collective."""
        wanted: dict[int, list[tuple[int, int]]] = {
            states.data_ptr(): [] for buffer in self._buffers for states in buffer.states.values()
        }
        for part in nested_values(sharded):
            if self._buffers and isinstance(part, ShardedTensor) and part.key.startswith(_KEYS):
                storage = part.data.untyped_storage().data_ptr()
                assert storage in wanted, f"{part.key} is a copy, and would stay zero"
                if is_main_replica(part.replica_id):
                    wanted[storage].append(_extent(part.data))
        for buffer in self._buffers:
            _fill(buffer, {name: sorted(wanted[states.data_ptr()]) for name, states in buffer.states.items()})


def _extent(view: Tensor) -> tuple[int, int]:
    """The numbers of its storage from the first to the last of a view."""
    start = int(view.storage_offset())
    if view.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return start, start + int(last) + 1


def _fill(buffer: _Buffer, wanted: dict[str, list[tuple[int, int]]]) -> None:
    optimizer = buffer.optimizer
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)  # fused Adams have none before their first step
    (of_buckets,) = optimizer.gbuf_ranges[buffer.index].values()
    for bucket, ranges in zip(optimizer.buffers[buffer.index].buckets, of_buckets, strict=True):
        own = [
            (place["gbuf_local"].start, optimizer._get_main_param_and_optimizer_states(parameter))
            for parameter, place in ranges["param_map"].items()
        ]
        for name in _STATES:
            mine = [(start, states[name].detach().view(-1)) for start, states in own]
            for place, piece in _pieces(mine, bucket, optimizer.data_parallel_group):
                for start, stop in _common(wanted[name], place, place + len(piece)):
                    buffer.states[name][start:stop].copy_(piece[start - place : stop - place])


def _pieces(mine: list[tuple[int, Tensor]], bucket: Any, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(place in the buffer, float32 numbers) of a bucket, on the device; valid until the next is asked for. Collective.

    Args:
        mine: (place in this rank's share of the bucket, numbers) of each parameter in it.
        bucket: megatron-core's; its ranks have equal shares.
        group: its ranks.
    """
    share = bucket.grad_data.numel() // group.size()
    step = min(share, max(1, PIECE_BYTES // torch.float32.itemsize // group.size()))
    sending = torch.empty(step, device=platform.device())
    receiving = sending if group.size() == 1 else sending.new_empty(group.size() * step)
    for start in range(0, share, step):
        length = min(step, share - start)
        sent, received = sending[:length], receiving[: group.size() * length]
        sent.zero_()  # what is padding
        for place, numbers in mine:
            for first, last in _common([(place, place + len(numbers))], start, start + length):
                sent[first - start : last - start] = numbers[first - place : last - place]
        if group.size() > 1:
            dist.all_gather_into_tensor(received, sent, group=group)
        for index, piece in enumerate(received.split(length)):
            yield bucket.offset + index * share + start, piece


def _common(ranges: list[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """What ranges have in common with start:stop; nothing that is empty."""
    for first, last in ranges:
        if max(first, start) < min(last, stop):
            yield max(first, start), min(last, stop)
