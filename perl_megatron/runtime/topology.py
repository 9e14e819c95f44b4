"""The layout of the ranks: megatron-core's process groups behind one small immutable record."""

from __future__ import annotations

import faulthandler
import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from perl_megatron.config.layout import check_layout
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.launch.failures import record_failure
from perl_megatron.runtime import platform

SHUTDOWN_SECONDS = 120.0
"""That leaving the process groups may take."""


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. Ranks are ordered tensor-fastest, then context, data, pipeline, as megatron-core does."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    context_rank: int = 0
    context_size: int = 1
    vision_group: dist.ProcessGroup | None = None
    """Of this rank alone, where every tensor-parallel rank holds the whole vision tower; None where they share it."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens and images (in its first model chunk)."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the logits (in its last model chunk)."""
        return self.pipeline_rank == self.pipeline_size - 1

    def tensor_group(self) -> dist.ProcessGroup:
        """The ranks that share each layer's matrices."""
        return parallel_state.get_tensor_model_parallel_group()

    def context_group(self) -> dist.ProcessGroup:
        """The ranks that hold the parts of each sequence."""
        return parallel_state.get_context_parallel_group()

    def pipeline_group(self) -> dist.ProcessGroup:
        """The ranks that hold successive blocks of layers; its order is the order of the stages."""
        return parallel_state.get_pipeline_model_parallel_group()


def initialize(parallel: ParallelConfig, *, seed: int, timeout_seconds: float) -> Topology:
    """Join the process group, make megatron-core's groups, and seed every generator of this process.

    Works under torchrun, and in a single process started by hand. ``timeout_seconds`` bounds every collective. The
    model-parallel generators (dropout) differ between tensor ranks; the others are equal on all ranks.
    """
    platform.install()
    rank, world_size = platform.rank_and_world_size()
    check_layout(parallel, world_size)
    if platform.is_cuda():
        if platform.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"process {platform.local_rank()} of this machine has no GPU: there are {torch.cuda.device_count()}",
                where="parallel.tensor, parallel.pipeline, parallel.data",
                fix="start fewer processes on this machine, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU",
            )
        torch.cuda.set_device(platform.device())
    if not dist.is_initialized():
        # By hand, a store within the process: no port is opened that another job could hold.
        store = None if platform.is_torchrun() else dist.HashStore()
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(platform.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=max(1, math.ceil(timeout_seconds / 60)),
    )
    vision_group = None
    if parallel.vision == "replicated" and parallel.tensor > 1:
        # One of megatron-core's, so that it is forgotten with the others.
        vision_group = parallel_state.create_group([rank], use_local_synchronization=True, group_desc="VISION_GROUP")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed % 2**31)
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        vision_group=vision_group,
    )


def forget_layout() -> None:
    """Leave megatron-core's groups and keep the ranks together: a later ``initialize`` may choose another layout."""
    if parallel_state.model_parallel_is_initialized():
        # megatron-core only forgets them; on gloo each keeps its threads, hundreds after a few layouts.
        for group in parallel_state._global_process_group_list or []:
            if group is not None:
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Leave all process groups, at the end of the process.

    Under torchrun a process cannot come back: the ranks' next meeting would find this one's keys in the launcher's
    store, and hang. NCCL may wait for a rank that is stuck: after ``SHUTDOWN_SECONDS`` this process shows its stacks
    and ends with status 1.
    """
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(SHUTDOWN_SECONDS, exit=True, file=sys.__stderr__)
    try:
        forget_layout()
        if dist.is_initialized():
            dist.destroy_process_group()
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def left_at_the_end() -> Iterator[None]:
    """``shutdown`` at the end of the block. What ended it is told before, as leaving may not come to an end."""
    try:
        yield
    except Exception as error:
        if not record_failure(error) and dist.is_initialized() and dist.get_world_size() > 1:
            print(f"{type(error).__name__}: {error} (rank {dist.get_rank()})", file=sys.stderr, flush=True)
        raise
    finally:
        shutdown()
