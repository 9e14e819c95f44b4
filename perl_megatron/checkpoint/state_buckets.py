"""A fault of megatron-core's that writes wrong optimizer states into checkpoints, and its mending.

megatron-core 0.16.1, optimizer/distrib_optimizer.py: ``get_parameter_state_dp_zero`` packs the buckets of a gradient
buffer without the padding at their ends, and ``sharded_param_state_fully_reshardable`` cuts parameters out of that at
places that count the padding. So where a buffer has a second bucket, all parameters behind the first padding are saved
as their neighbours' values, with no more than a warning ("can lead to data corruption"). A tied embedding over several
pipeline stages has a bucket of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def keep_bucket_padding(optimizer: MegatronOptimizer) -> None:
    """Make distributed optimizers lay their states out as their parameters' places say. Idempotent."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            part.get_parameter_state_dp_zero = partial(_padded_states, part)


def _padded_states(optimizer: DistributedOptimizer, *args: Any, **options: Any) -> dict[Any, Any] | None:
    """What the method gives, with the padding at the end of each bucket put back; None where it gives None."""
    states = DistributedOptimizer.get_parameter_state_dp_zero(optimizer, *args, **options)
    if states is None:
        return None
    for index, buffer in enumerate(optimizer.buffers):
        for tensors in states[index].values():
            for key, packed in tensors.items():
                if isinstance(packed, torch.Tensor):
                    tensors[key] = _with_padding(packed, buffer)
    return states


def _with_padding(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """[sum of the buckets' numbers] → [the buffer's size], each bucket at its own offset."""
    padded = packed.new_zeros(buffer.numel)
    parts = packed.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        padded[bucket.offset : bucket.offset + len(part)] = part
    return padded
