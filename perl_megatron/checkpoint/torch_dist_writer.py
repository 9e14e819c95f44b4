"""Writing a weights-only torch_dist folder in one process, without megatron-core, one parameter in memory at a time.

megatron-core loads the folder in any layout. ``tensor_size`` and ``pipeline_size`` choose how it is cut: each rank of
that layout then reads whole chunks, from files of its own (``__RANK_NUMBER.distcp``).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from perl_megatron.checkpoint.disk import write_failure
from perl_megatron.checkpoint.file_groups import FileGroup, PlannedTensor, ReadTensor, cut_into_groups
from perl_megatron.checkpoint.qwen25_vl_table import Entry, table
from perl_megatron.checkpoint.torch_dist_index import BACKEND, FORMAT_FILE
from perl_megatron.checkpoint.torch_dist_layout import chunks, extra_state_keys, parameter_shape, place
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.config.layout import check_split
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import Architecture

COMMON_FILE = "common.pt"
_FORMAT = {
    "sharded_backend": BACKEND,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistTarget:
    """The files of one model, cut for a layout."""

    def __init__(
        self,
        architecture: Architecture,
        infos: Mapping[str, TensorInfo],
        *,
        tensor_size: int,
        pipeline_size: int,
        max_file_bytes: int,
    ):
        """``infos`` are the published tensors as they will be written.

        Raises UserError where the model does not split that way, and for layers whose dtypes differ.
        """
        _check_tensor_size(architecture, tensor_size)
        if not 1 <= pipeline_size <= architecture.num_layers:
            raise UserError(
                f"{architecture.num_layers} layers do not split into {pipeline_size} pipeline stages",
                where=f"--pp {pipeline_size}",
            )
        self._architecture, self._infos, self._tensor_size = architecture, infos, tensor_size
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._entries = {entry.published: entry for entry in table(architecture)}
        for entry in self._entries.values():
            self._add_shape(entry)
        self.groups: list[FileGroup] = []
        for stage in range(pipeline_size):
            entries = [e for e in self._entries.values() if self._stage(e, pipeline_size) == stage]
            sizes = [sum(infos[name].nbytes for name in entry.published) for entry in entries]
            cut = cut_into_groups(zip(entries, sizes, strict=True), max_file_bytes)
            for number, (members, nbytes) in enumerate(cut):
                ranks = range(tensor_size if any(entry.op.sharded for entry in members) else 1)
                files = tuple(f"__{stage * tensor_size + rank}_{number}.distcp" for rank in ranks)
                self.groups.append(FileGroup(files, tuple(entry.published for entry in members), nbytes))

    def plan(self) -> list[PlannedTensor]:
        """Every tensor, in the order of writing."""
        rows = []
        for group in self.groups:
            for published in group.published:
                entry = self._entries[published]
                where = place(entry.megatron, self._architecture)
                layer = "" if where.layer is None else f"[{where.layer}]"
                count = self._tensor_size if entry.op.sharded else 1
                layout = f"{type(entry.op).__name__} / {count}"
                for name in published:
                    info = self._infos[name]
                    stored = f"{where.key}{layer} {layout}"
                    files = " ".join(group.files[:count])
                    rows.append(PlannedTensor(name, info.shape, info.dtype, info.nbytes, stored, files))
        return rows

    def write(self, folder: Path, group: FileGroup, read: ReadTensor) -> list[Any]:
        """Write the files of a group; gives [key, offsets, sizes, file, start, length] of every chunk.

        UserError naming the tensor where the disk is full.
        """
        records: list[Any] = []
        with ExitStack() as stack, _without_checksums():
            streams = [stack.enter_context(_Stream(folder / file)) for file in group.files]
            for published in group.published:
                entry, what = self._entries[published], f"tensor {', '.join(published)}"
                parts = [read(name) for name in published]
                where = place(entry.megatron, self._architecture)
                for rank, stream in enumerate(streams):
                    for offsets, values in chunks(entry, parts, rank, self._tensor_size):
                        start, length = stream.append(_alone(values).view(where.chunk_shape(values.shape)), what)
                        place_of_chunk = [where.offsets(offsets), where.chunk_shape(values.shape)]
                        records.append([where.key, *place_of_chunk, group.files[rank], start, length])
                del parts
                for key in extra_state_keys(entry, self._architecture):
                    records.append([key, None, None, group.files[0], *streams[0].append([None], what)])
        return records

    def finish(self, folder: Path, records: Sequence[Any]) -> None:
        """Write the index, and what megatron-core looks for beside it."""
        described: dict[str, STORAGE_TYPES] = {}
        stored = []
        for key, offsets, sizes, file, start, length in (row for rows in records for row in rows):
            if offsets is None:
                described[key] = BytesStorageMetadata()
            else:
                shape, dtype = self._shapes[key]
                tensor = described.setdefault(
                    key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
                )
                assert isinstance(tensor, TensorStorageMetadata)
                tensor.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            stored.append(WriteResult(MetadataIndex(key, offsets), length, _StorageInfo(file, start, length)))
        FileSystemWriter(folder).finish(Metadata(described), [stored])
        torch.save({}, folder / COMMON_FILE)
        (folder / FORMAT_FILE).write_text(json.dumps(_FORMAT) + "\n", encoding="utf-8")

    def _add_shape(self, entry: Entry) -> None:
        where = place(entry.megatron, self._architecture)
        parts = [self._infos[name].meta() for name in entry.published]
        described = (where.global_shape(parameter_shape(entry, parts, self._tensor_size)), parts[0].dtype)
        if any(part.dtype != parts[0].dtype for part in parts) or self._shapes.get(where.key, described) != described:
            raise UserError(
                f"the dtypes of {', '.join(entry.published)} differ, or differ from another layer's: torch_dist keeps "
                "all layers of a kind in one tensor",
                fix="choose one with --dtype",
            )
        self._shapes[where.key] = described

    def _stage(self, entry: Entry, pipeline_size: int) -> int:
        where = place(entry.megatron, self._architecture)
        if entry.megatron.startswith("vision_model.") or ".embedding." in entry.megatron:
            return 0
        if where.layer is None:
            return pipeline_size - 1
        return where.layer * pipeline_size // self._architecture.num_layers


def _check_tensor_size(architecture: Architecture, tensor_size: int) -> None:
    if tensor_size < 1:
        raise UserError("the tensor-parallel size is at least 1", where=f"--tp {tensor_size}")
    try:
        check_split(ParallelConfig(tensor=tensor_size), architecture.numbers)
    except UserError as error:
        raise UserError(error.what, where=f"--tp {tensor_size}", fix="choose a smaller one") from error


class _Stream(io.FileIO):
    """A file to which torch.save appends. torch.save hides why writing failed; this keeps the system's error."""

    _failure: OSError | None

    def __init__(self, path: Path):
        self._path, self._failure = path, None
        try:
            super().__init__(path, "wb")
        except OSError as error:
            raise write_failure(error, "the weight file", path) from error

    def write(self, data: Any) -> int:
        """All of ``data``; the system may take less than all at once."""
        remaining = memoryview(data)
        try:
            while remaining:
                remaining = remaining[super().write(remaining) :]
        except OSError as error:
            self._failure = error
            raise
        return len(data)

    def append(self, value: Any, what: str) -> tuple[int, int]:
        """Where the value begins, and how many bytes it takes; an error calls it ``what``."""
        start = self.tell()
        try:
            torch.save(value, cast(BinaryIO, self))
        except (OSError, RuntimeError) as error:
            if self._failure is None:
                raise
            raise write_failure(self._failure, what, self._path) from error
        return start, self.tell() - start


@contextmanager
def _without_checksums() -> Iterator[None]:
    """The checksums of torch.save take ten times as long as the rest of it; files have digests in the manifest."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _alone(values: torch.Tensor) -> torch.Tensor:
    """Contiguous, and all of its storage: torch.save writes the whole storage of a view."""
    values = values.contiguous()
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()
