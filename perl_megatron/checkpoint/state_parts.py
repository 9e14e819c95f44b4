"""This rank's part of a torch_dist checkpoint, copied out of the training state, so that it can be written any time.

megatron-core plans who writes what and finds the metadata, as in its own asynchronous save. Left out are its worker
processes (forked from a trainer with threads, or started anew for ten seconds), and its agreements at the end, which
go over the trainer's own process group: here a thread writes, and the ranks agree over a group of its own.
"""

from __future__ import annotations

import copy
import io
import os
import queue
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.metadata import Metadata

from perl_megatron.checkpoint.disk import write_failure
from perl_megatron.checkpoint.manifest import on_rank_zero
from perl_megatron.checkpoint.state_gather import GatheredStates
from perl_megatron.errors import UserError
from perl_megatron.runtime.collective import any_rank, gather_objects, rank, together

_BACKEND, _VERSION = "torch_dist", 1


@dataclass(frozen=True)
class StateParts:
    """What this rank writes of a checkpoint. Its tensors are copies on the CPU."""

    folder: Path
    common: bytes
    """The file of what all ranks share (rank 0's is written)."""
    writer: FileSystemWriterAsync
    metadata: Metadata | None
    """Where each part of each global tensor lies (rank 0's; None on the others)."""

    def write(self) -> list[str]:
        """Write all files and wait for the disk. Collective; UserError on all ranks where one of them cannot.

        Returns the names of the files that this rank has written, but for those of rank 0 alone.
        """
        results = together(self._write_parts)
        results_of_ranks = gather_objects(results)
        on_rank_zero(lambda: self._describe(results_of_ranks))
        return sorted({result.storage_data.relative_path for result in results})

    def _write_parts(self) -> list[Any]:
        results: list[Any] = []
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        for number, bucket in enumerate(self.writer.write_buckets or ()):
            outcome: queue.Queue[Any] = queue.Queue()
            counted: queue.Queue[int] = queue.Queue()
            counted.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcome, counted, use_fsync=True)
            _, written = outcome.get()
            if isinstance(written, Exception):
                raise _failure(written, self.folder) from written
            results += written
        return results

    def _describe(self, results_of_ranks: list[Any]) -> None:
        assert self.metadata is not None
        with (self.folder / COMMON_STATE_FNAME).open("wb") as file:
            file.write(self.common)
            file.flush()
            os.fsync(file.fileno())
        self.writer.finish(self.metadata, results_of_ranks)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(self.folder))


class StatePlanner:
    """Plans and copies the checkpoints of one training state, and keeps the plan for those that follow.

    Which rank writes which part depends on names and shapes alone, and is found by exchanging those of all ranks: half
    of the time that training stands still for a small policy, and more with each rank. So it is done again only where
    they have changed on any rank.
    """

    def __init__(self) -> None:
        self._structure: list[tuple[Any, ...]] | None = None
        self._strategy, self._shared = _new_strategies()

    def copy_parts(
        self, sharded: dict[str, Any], content_metadata: dict[str, Any], states: GatheredStates, folder: Path
    ) -> StateParts:
        """This rank's part as it is now; nothing but empty folders is written. Collective.

        Args:
            sharded: megatron-core's description of the whole state.
            content_metadata: how it was described.
            states: the optimizer's in it.
            folder: where the files will lie.
        """
        sharded["content_metadata"] = content_metadata
        parts, common = save_preprocess(sharded, validate_access_integrity=False)
        structure = _structure(parts)
        if any_rank(structure != self._structure):
            self._structure = None
            self._strategy, self._shared = _new_strategies()
            validate_sharding_integrity(determine_global_metadata(parts)[1], common_state_dict=common)
        # Without this, megatron-core starts a process to hand results from one of its functions to the next.
        filesystem_async._results_queue = queue.Queue()
        if self._shared is not None:
            self._shared.apply_saving_parallelization(parts)
        states.fill(parts)
        self._strategy.async_save(parts, folder)
        writer, metadata = self._strategy.take()
        self._structure = structure
        _copy_to_cpu(writer, states.are_own)
        shared = io.BytesIO()
        if rank() == 0:
            torch.save(common, shared)
        return StateParts(folder, shared.getvalue(), writer, metadata)


def _structure(parts: Any) -> list[tuple[Any, ...]]:
    """Everything about this rank's tensors and objects but their values."""
    return [
        (type(part), *(value for name, value in vars(part).items() if name != "data")) for part in nested_values(parts)
    ]


class _PlanOnly(TorchDistSaveShardedStrategy):
    """megatron-core's strategy up to where files would be written."""

    _writer: FileSystemWriterAsync | None = None
    _metadata: Metadata | None = None

    def take(self) -> tuple[FileSystemWriterAsync, Metadata | None]:
        """Of the last plan; the metadata is rank 0's alone."""
        writer, self._writer = self._writer, None
        assert writer is not None
        return writer, self._metadata

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        metadata = save_state_dict_ret[1]
        self._writer, self._metadata = writer, copy.copy(metadata)  # where the files' parts lie goes into the copy
        # By itself it trusts its plan when a second one, made in full, was the same.
        self.cached_global_metadata, self.validated_cache_reuse = metadata, True
        return AsyncRequest(None, (), [])


def _new_strategies() -> tuple[_PlanOnly, FullyParallelSaveStrategyWrapper | None]:
    """One that has planned nothing yet, and what shares the writing among replicas, where there are some."""
    strategy = _PlanOnly(_BACKEND, _VERSION, cached_metadata=True)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if replicas.size() == 1:
        return strategy, None
    return strategy, FullyParallelSaveStrategyWrapper(strategy, replicas, do_cache_distribution=True)


def _copy_to_cpu(writer: FileSystemWriterAsync, is_own: Callable[[str], bool]) -> None:
    """In place: the next update changes the tensors, but for those that ``is_own`` says, by key, are the writer's own.

    From a GPU, one copy after the other into ordinary memory. torch page-locks the memory of copies that need not be
    waited for, each block rounded up to a power of two, and never gives it back: up to twice the checkpoint's size.
    """
    for _, _, (_, tensors) in writer.write_buckets or ():
        for index, (item, tensor) in enumerate(tensors):
            if not is_own(item.index.fqn):
                tensors[index] = (item, tensor.detach().to("cpu", copy=True))


def _failure(error: Exception, folder: Path) -> UserError:
    cause: BaseException | None = error
    while cause is not None:  # torch's archive writer stumbles over what the file system said, and says that
        if isinstance(cause, OSError):
            return write_failure(cause, "the checkpoint", folder)
        cause = cause.__cause__ or cause.__context__
    return UserError(
        f"the checkpoint could not be written: {type(error).__name__}: {error}",
        where=str(folder),
        fix="look for a full disk or a quota there",
    )
