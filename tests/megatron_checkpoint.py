"""Weights-only torch_dist checkpoints by megatron-core itself, of the policy in the current layout."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from perl_megatron.model.policy import Policy


def save_policy(chunks: Sequence[Policy], folder: Path) -> None:
    """Collective; the folder exists."""
    filesystem_async._results_queue = queue.Queue()  # as in checkpoint/state.py: no process is started for it
    dist_checkpointing.save(_sharded(chunks), str(folder))


def load_policy(chunks: Sequence[Policy], folder: Path) -> None:
    """Collective; every parameter is set to NaN before, so that one which is not loaded shows."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    loaded = dist_checkpointing.load(_sharded(chunks), str(folder))
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"])


def parameters(chunks: Sequence[Policy]) -> list[torch.Tensor]:
    """Copies of all parameters of this rank."""
    return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


def _sharded(chunks: Sequence[Policy]) -> dict:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": False, "dp_cp_group": group}
    return {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
