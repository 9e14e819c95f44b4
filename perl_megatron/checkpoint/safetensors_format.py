"""The safetensors layout: 8 bytes that give the header's length, a JSON header, and the tensors' bytes end to end.

Reading goes through plain reads into memory of the tensor's own, not through a mapping of the file: what was read and
dropped does not stay resident, and a file that shrinks while it is in use is an error, not a crash.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from perl_megatron.errors import UserError

LENGTH_BYTES = 8
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names in the header → dtypes."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a file holds a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its bytes, from the beginning of the file."""
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file in the order of their bytes; reads only the header.

    Raises UserError where the file is missing, cut short, no safetensors, or holds a dtype that is not in ``DTYPES``.
    """
    if not file.is_file():
        raise UserError(
            "the weight file does not exist", where=str(file), fix="give a folder with safetensors weights, complete"
        )
    try:
        with safe_open(file, framework="pt"):
            pass  # the library checks the header, and that the bytes fill the file without gaps or overlaps
        header, length = _read_json(file)
    except (SafetensorError, OSError, ValueError) as error:
        name = _first_cut(file)
        cut = (
            "it may be cut short" if name is None else f"it is cut short: tensor {name} is the first that is not whole"
        )
        raise UserError(f"cannot read the weight file, {cut}: {error}", where=str(file), fix="copy it again") from error
    header.pop(METADATA, None)
    stored = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"tensor {name} has dtype {entry['dtype']}",
                where=str(file),
                fix=f"dtypes that can be read: {', '.join(DTYPES)}",
            )
        start, end = entry["data_offsets"]
        stored[name] = StoredTensor(
            DTYPES[entry["dtype"]], tuple(entry["shape"]), LENGTH_BYTES + length + start, end - start
        )
    return stored


def _read_json(file: Path) -> tuple[dict[str, Any], int]:
    """The header and its length. OSError and ValueError where there is none."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if length > file.stat().st_size:
            raise ValueError("the header is longer than the file")
        return json.loads(opened.read(length)), length


def _first_cut(file: Path) -> str | None:
    """The first tensor that the file does not hold to its end; None where there is none, or no header says so."""
    try:
        header, length = _read_json(file)
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != METADATA}
        present = file.stat().st_size - LENGTH_BYTES - length
        return min((name for name in ends if ends[name] > present), key=lambda name: ends[name], default=None)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def read_tensor(file: BinaryIO, stored: StoredTensor) -> torch.Tensor:
    """The tensor, in memory of its own; EOFError where the file ends before it does."""
    content = torch.empty(stored.num_bytes, dtype=torch.uint8)
    buffer = content.numpy().data
    done = 0
    while done < stored.num_bytes:
        count = os.preadv(file.fileno(), [buffer[done:]], stored.start + done)
        if count == 0:
            raise EOFError(f"the file ends {stored.num_bytes - done} bytes too early")
        done += count
    return content.view(stored.dtype).view(stored.shape)
