"""The index of a torch_dist folder: which file holds which chunk of which global tensor, and how to read a chunk.

The index (``.metadata``) is torch.distributed.checkpoint's, a pickle; what it points at are ranges of files that
torch.save wrote.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum, EnumType
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from perl_megatron.checkpoint.disk import file_inside
from perl_megatron.errors import UserError

INDEX = ".metadata"
FORMAT_FILE = "metadata.json"
BACKEND = "torch_dist"
"""The format's name in ``FORMAT_FILE``."""
COPY_AGAIN = "copy the checkpoint again, or take another"


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a global tensor, and the bytes of a file that hold it as torch.save wrote it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class GlobalTensor:
    """One key of the checkpoint: all layers and all ranks' shards."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def is_torch_dist(path: Path) -> bool:
    """Whether a folder looks like a torch_dist checkpoint, be it without its index."""
    if (path / INDEX).is_file():
        return True
    try:
        content = json.loads((path / FORMAT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or one of something else
        return False
    return isinstance(content, dict) and content.get("sharded_backend") == BACKEND


def read_index(path: Path) -> dict[str, GlobalTensor]:
    """Key → tensor of everything but the optimizer's. Reads the index and the files' sizes.

    Raises UserError where the index is missing or damaged, and where a file is missing or cut short.
    """
    metadata = _load_index(path / INDEX)
    chunks = _collect_chunks(path, metadata)
    return {
        key: GlobalTensor(tuple(value.size), value.properties.dtype, tuple(chunks[key]))
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and not key.startswith("optimizer.")
    }


def check_index(path: Path) -> None:
    """UserError where the index of a checkpoint is missing or damaged, holds what is no part of an index, or names a
    file outside the folder.

    To be called before megatron-core or torch read it: they unpickle whatever they find.
    """
    _load_index(path / INDEX)


def load_chunk(chunk: Chunk, key: str, dtype: torch.dtype) -> torch.Tensor:
    """The chunk's values. Raises UserError naming tensor and file where they cannot be read or are something else."""
    try:
        with chunk.file.open("rb", buffering=0) as file:
            part = cast(BinaryIO, _FileSlice(file, chunk.start, chunk.length))
            values = torch.load(part, map_location="cpu", weights_only=True)
        fits = isinstance(values, torch.Tensor) and tuple(values.shape) == chunk.sizes and values.dtype == dtype
    except Exception as error:  # damaged archives raise RuntimeError, UnpicklingError, EOFError and others
        raise UserError(f"cannot read tensor {key}: {error}", where=str(chunk.file), fix=COPY_AGAIN) from error
    if not fits:
        raise UserError(f"tensor {key} is not what the index says", where=str(chunk.file), fix=COPY_AGAIN)
    return values


def _collect_chunks(path: Path, metadata: Metadata) -> dict[str, list[Chunk]]:
    """Key → chunks, whose bytes exist."""
    sizes: dict[str, int] = {}
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    shapes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
        for chunk in value.chunks
    }
    for index, storage in (metadata.storage_data or {}).items():
        if index.offset is None or index.fqn.startswith("optimizer."):
            continue
        file = path / storage.relative_path
        if storage.relative_path not in sizes:
            if not file.is_file():
                raise UserError(f"the file with tensor {index.fqn} is missing", where=str(file), fix=COPY_AGAIN)
            sizes[storage.relative_path] = file.stat().st_size
        if storage.offset + storage.length > sizes[storage.relative_path]:
            raise UserError(f"the file is cut short: tensor {index.fqn}", where=str(file), fix=COPY_AGAIN)
        if getattr(storage, "transform_descriptors", None):
            raise UserError(f"tensor {index.fqn} is stored compressed, which is not supported", where=str(file))
        offsets = tuple(index.offset)
        chunks[index.fqn].append(Chunk(offsets, shapes[index.fqn, offsets], file, storage.offset, storage.length))
    return chunks


_FORMAT = "torch.distributed.checkpoint"
_ALLOWED = {
    *((f"{_FORMAT}.metadata", name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata")),
    *((f"{_FORMAT}.metadata", name) for name in ("MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_FORMAT}.metadata", name) for name in ("TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *((f"{_FORMAT}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    (f"{_FORMAT}.filesystem", "_StorageInfo"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ("torch.serialization", "_get_layout"),
}
"""What an index is made of; anything else could be a program."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into an index")
        return super().find_class(module, name)


def _member(kind: object, name: str) -> Enum:
    """A member of an enumeration, which some Pythons (3.11.2, Debian 12's) pickle as ``getattr(kind, name)``."""
    if not isinstance(kind, EnumType) or name not in kind.__members__:
        raise pickle.UnpicklingError("an attribute that is no member of an enumeration does not belong into an index")
    return kind[name]


def _load_index(file: Path) -> Metadata:
    if not file.is_file():
        raise UserError("the index of the torch_dist checkpoint is missing", where=str(file), fix=COPY_AGAIN)
    try:
        with file.open("rb") as opened:
            metadata = _IndexUnpickler(opened).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"the checkpoint's index cannot be read: {error}", where=str(file), fix=COPY_AGAIN) from error
    if not isinstance(metadata, Metadata):
        raise UserError("the checkpoint's index describes something else", where=str(file), fix=COPY_AGAIN)
    for storage in (metadata.storage_data or {}).values():  # megatron-core and torch open whatever file it names
        file_inside(file.parent, getattr(storage, "relative_path", None), named_by=file)
    return metadata


class _FileSlice(io.RawIOBase):
    """Part of a file, seekable, for torch.load."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Within the part."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Not beyond the part's end."""
        view = memoryview(buffer)[: max(self._length - self._position, 0)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view) or 0
        self._position += count
        return count
