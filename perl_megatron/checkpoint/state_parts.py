"""This rank's part of a torch_dist checkpoint, copied out of the training state, so that it can be written any time.

megatron-core plans who writes what and finds the metadata, as in its own asynchronous save. Left out are its worker
processes (forked from a trainer with threads, or started anew for ten seconds), and its agreements at the end, which
go over the trainer's own process group: here a thread writes, and the ranks agree over a group of its own.
"""

from __future__ import annotations

import io
import os
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata

from perl_megatron.checkpoint.disk import write_failure
from perl_megatron.checkpoint.manifest import on_rank_zero
from perl_megatron.errors import UserError
from perl_megatron.runtime.collective import gather_objects, rank, together

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

    @classmethod
    def copy(cls, sharded: dict[str, Any], content_metadata: dict[str, Any], group: Any, folder: Path) -> StateParts:
        """Plan and copy; nothing but empty folders is written. Collective.

        Args:
            sharded: megatron-core's description of the whole state.
            content_metadata: how it was described.
            group: the ranks that hold replicas of each other's parts, and share the writing of them.
            folder: where the files will lie.
        """
        sharded["content_metadata"] = content_metadata
        parts, common = save_preprocess(sharded)
        strategy = _PlanOnly(_BACKEND, _VERSION)
        # Without this, megatron-core starts a process to hand results from one of its functions to the next.
        filesystem_async._results_queue = queue.Queue()
        FullyParallelSaveStrategyWrapper(strategy, group).async_save(parts, folder)
        assert strategy.writer is not None
        _copy_to_cpu(strategy.writer)
        shared = io.BytesIO()
        if rank() == 0:
            torch.save(common, shared)
        return cls(folder, shared.getvalue(), strategy.writer, strategy.metadata)

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


class _PlanOnly(TorchDistSaveShardedStrategy):
    """megatron-core's strategy up to where files would be written."""

    writer: FileSystemWriterAsync | None = None
    metadata: Metadata | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def _copy_to_cpu(writer: FileSystemWriterAsync) -> None:
    """In place: the next update changes the tensors.

    From a GPU, one copy after the other into ordinary memory. torch page-locks the memory of copies that need not be
    waited for, each block rounded up to a power of two, and never gives it back: up to twice the checkpoint's size.
    """
    for _, _, (_, tensors) in writer.write_buckets or ():
        for index, (item, tensor) in enumerate(tensors):
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
