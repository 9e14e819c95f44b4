"""What every kind of checkpoint gives: published tensors by name, and their shapes and dtypes without reading them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of the numbers alone."""
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype that has no memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Weights(Mapping[str, torch.Tensor]):
    """Published tensors of a checkpoint on disk; each is read when it is asked for, and not kept."""

    path: Path

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor; reads no tensor."""
