"""A safetensors file written one tensor at a time: memory holds one tensor, and no byte is written twice.

The header comes first in the file but is known last, so room for it is reserved and filled up with spaces at the end,
as the format allows. A file whose room is used up takes no more tensors; the caller begins another.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from perl_megatron.checkpoint.disk import write_failure
from perl_megatron.checkpoint.safetensors_format import DTYPES, LENGTH_BYTES, METADATA
from perl_megatron.errors import UserError

HEADER_BYTES = 256 * 1024
"""Room for the entries of about 2,000 tensors; a published shard of 4 GiB holds less than 800. A multiple of 8, so that
tensors stand aligned."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OPENING = json.dumps({METADATA: {"format": "pt"}}, separators=(",", ":")).removesuffix("}")


class SafetensorsWriter:
    """One file. Until ``finish`` it has no header, so no reader takes it for whole."""

    def __init__(self, path: Path, *, header_bytes: int = HEADER_BYTES):
        """Create the file, which must not exist. UserError where that fails."""
        assert header_bytes % 8 == 0
        self.path = path
        self.num_bytes = 0
        """Of the tensors so far."""
        self._entries: dict[str, str] = {}
        self._header_bytes = header_bytes
        self._entry_bytes = len(_OPENING) + len("}")
        try:
            with path.open("xb") as file:
                file.truncate(LENGTH_BYTES + header_bytes)
        except OSError as error:
            raise write_failure(error, "the weight file", path) from error

    @property
    def names(self) -> list[str]:
        """The tensors so far."""
        return list(self._entries)

    def has_room(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the header has room for the tensor, and its bytes would begin at a multiple of its item size."""
        fits = self._entry_bytes + len(self._entry(name, tensor)) <= self._header_bytes
        return fits and self.num_bytes % tensor.element_size() == 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor of any shape, on any device. The file must have room for it.

        Raises UserError naming tensor and file where the disk is full, and for a dtype that safetensors has not.
        """
        assert name not in self._entries, name
        assert self.has_room(name, tensor), name
        entry = self._entry(name, tensor)
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        remaining = content.numpy().data
        try:
            with self.path.open("ab", buffering=0) as file:
                while remaining:
                    remaining = remaining[file.write(remaining) :]  # the system may take less than all at once
        except OSError as error:
            raise write_failure(error, f"tensor {name}", self.path) from error
        self._entries[name] = entry
        self._entry_bytes += len(entry)
        self.num_bytes += tensor.nbytes

    def finish(self, *, sync: bool = True) -> None:
        """Write the header, and (with ``sync``) wait until the whole file is on the disk. UserError if it is full."""
        header = "".join([_OPENING, *self._entries.values(), "}"]).encode().ljust(self._header_bytes)
        try:
            with self.path.open("r+b") as file:
                file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise write_failure(error, f"the header of {len(self._entries)} tensors", self.path) from error

    def _entry(self, name: str, tensor: torch.Tensor) -> str:
        """JSON in ASCII, so that its length is its size."""
        if tensor.dtype not in _NAMES:
            raise UserError(f"tensor {name} has dtype {tensor.dtype}, which safetensors has not", where=str(self.path))
        content = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.num_bytes, self.num_bytes + tensor.nbytes],
        }
        return f",{json.dumps(name)}:{json.dumps(content, separators=(',', ':'))}"
