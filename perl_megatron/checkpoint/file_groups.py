"""What a conversion writes: groups of files, planned before anything is read.

A group is the unit of an interrupted conversion: its files are all whole and recorded, or are written again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

ReadTensor = Callable[[str], torch.Tensor]
"""Gives a published tensor by name, in the dtype that is to be written."""


@dataclass(frozen=True)
class FileGroup:
    """Files that are written together, from whole Megatron parameters or published tensors."""

    files: tuple[str, ...]
    published: tuple[tuple[str, ...], ...]
    """The tensors in them, in the order in which they are read; those of one Megatron parameter belong together."""
    nbytes: int
    """Of the tensors."""


@dataclass(frozen=True)
class PlannedTensor:
    """A published tensor and what becomes of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    stored: str
    """Name and layout in the target."""
    file: str


class Target(Protocol):
    """A format that can be written group by group."""

    @property
    def groups(self) -> Sequence[FileGroup]:
        """All files, in the order of writing."""
        ...

    def plan(self) -> list[PlannedTensor]:
        """Every tensor, in the order of writing."""
        ...

    def write(self, folder: Path, group: FileGroup, read: ReadTensor) -> Any:
        """Write the files of one group; returns what ``finish`` has to know of them, as JSON."""
        ...

    def finish(self, folder: Path, records: Sequence[Any]) -> None:
        """Write what makes the folder loadable, from the records of all groups in their order."""
        ...


def cut_into_groups(items: Iterable[tuple[Any, int]], max_bytes: int) -> list[tuple[list[Any], int]]:
    """Runs of (item, bytes) of at most ``max_bytes``, or of a single larger item; (items, their bytes) of each."""
    groups: list[tuple[list[Any], int]] = []
    for item, nbytes in items:
        if not groups or groups[-1][1] + nbytes > max_bytes:
            groups.append(([], 0))
        members, total = groups[-1]
        groups[-1] = ([*members, item], total + nbytes)
    return groups
