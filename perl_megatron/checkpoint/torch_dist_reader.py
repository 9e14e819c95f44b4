"""A megatron-core torch_dist folder as published tensors, read one parameter at a time, in one process.

Neither megatron-core nor a process group is needed: the index (``.metadata``) says which file holds which chunk of
which global tensor, and only the chunks of the wanted parameter are read. Weights-only folders and training checkpoints
are the same here; the optimizer's tensors are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from perl_megatron.checkpoint.ops import GateUp, Vocabulary
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.checkpoint.qwen25_vl_table import Entry, table
from perl_megatron.checkpoint.torch_dist_index import COPY_AGAIN, GlobalTensor, load_chunk, read_index
from perl_megatron.checkpoint.torch_dist_layout import Place, parameter_shape, place
from perl_megatron.checkpoint.weights import TensorInfo, Weights
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import Architecture


class TorchDistWeights(Weights):
    """The model's tensors in a torch_dist folder, by their published names."""

    def __init__(self, path: Path, architecture: Architecture, stored: Mapping[str, GlobalTensor]):
        self.path = path
        self._architecture, self._stored = architecture, stored
        self._entries = {name: entry for entry in table(architecture) for name in entry.published}
        self._shapes = published_shapes(architecture)
        self._last: tuple[Entry, tuple[torch.Tensor, ...]] | None = None

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor; reads no tensor."""
        key = place(self._entries[name].megatron, self._architecture).key
        return TensorInfo(self._shapes[name], self._stored[key].dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._entries:
            raise UserError(f"there is no tensor {name}", where=str(self.path), fix="the checkpoint is not complete")
        entry = self._entries[name]
        if self._last is None or self._last[0] is not entry:
            self._last = None  # so that the old one's memory is free while the new one is read
            self._last = entry, self._read_entry(entry)
        parts = self._last[1]
        if len(parts) == 1 or name == entry.published[-1]:
            self._last = None  # its other parts have been asked for, as a rule
        return parts[entry.published.index(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _read_entry(self, entry: Entry) -> tuple[torch.Tensor, ...]:
        where = place(entry.megatron, self._architecture)
        stored = self._stored[where.key]
        shape = stored.shape if where.num_layers is None else stored.shape[1:]
        zeros = (0,) * len(shape)
        if isinstance(entry.op, GateUp):  # chunks of their own: the parts are read apart, and need no second copy
            half = (shape[0] // 2, *shape[1:])
            return tuple(self._read(where, start, half) for start in (zeros, (half[0], *zeros[1:])))
        return entry.op.join([self._read(where, zeros, shape)])

    def _read(self, where: Place, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """A rectangle of one parameter, put together from the chunks that it meets."""
        stored = self._stored[where.key]
        begin, shape = where.offsets(offsets), where.chunk_shape(sizes)
        result: torch.Tensor | None = None
        found = 0
        for chunk in stored.chunks:
            low = [max(ours, theirs) for ours, theirs in zip(begin, chunk.offsets, strict=True)]
            high = [
                min(ours + our_size, theirs + their_size)
                for ours, our_size, theirs, their_size in zip(begin, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(start >= end for start, end in zip(low, high, strict=True)):
                continue
            values = load_chunk(chunk, where.key, stored.dtype)
            for dimension, (start, end) in enumerate(zip(low, high, strict=True)):
                values = values.narrow(dimension, start - chunk.offsets[dimension], end - start)
            found += values.numel()
            if values.shape == shape:
                result = values
                break
            if result is None:
                result = torch.empty(shape, dtype=stored.dtype)
            target = result
            for dimension, (start, end) in enumerate(zip(low, high, strict=True)):
                target = target.narrow(dimension, start - begin[dimension], end - start)
            target.copy_(values)
        if result is None or found != math.prod(shape):
            raise UserError(f"the chunks of tensor {where.key} do not fill it", where=str(self.path), fix=COPY_AGAIN)
        return result if where.layer is None else result.squeeze(0)


def open_torch_dist(path: Path, architecture: Architecture) -> TorchDistWeights:
    """Open a torch_dist folder that holds this model in any layout; reads only its index.

    Raises UserError where the index is damaged or missing, a file is missing or cut short, and where the tensors are
    not those of ``architecture``: it names what is missing, what is too much, and what has another shape.
    """
    stored = read_index(path)
    _check_against(architecture, stored, path)
    return TorchDistWeights(path, architecture, stored)


def _check_against(architecture: Architecture, stored: Mapping[str, GlobalTensor], path: Path) -> None:
    problems = []
    shapes = published_shapes(architecture)
    expected: dict[str, tuple[int, ...]] = {}
    for entry in table(architecture):
        where = place(entry.megatron, architecture)
        if where.key in expected:
            continue
        parts = [torch.empty(shapes[name], device="meta") for name in entry.published]
        shape = expected[where.key] = where.global_shape(parameter_shape(entry, parts, 1))
        if where.key not in stored:
            problems.append(f"tensor {where.key} is missing")
            continue
        found = stored[where.key].shape
        padded = isinstance(entry.op, Vocabulary) and found[1:] == shape[1:] and found[0] >= shape[0]
        if found != shape and not padded:
            problems.append(f"tensor {where.key} has shape {found} instead of {shape}")
    problems += [f"tensor {key} is not expected" for key in sorted(stored.keys() - expected.keys())]
    if problems:
        raise UserError(
            f"the checkpoint is not what its config.json describes: {'; '.join(problems)}",
            where=str(path),
            fix="give the config.json of the model that it was written from",
        )
