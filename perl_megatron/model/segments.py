"""Which patches of a packed batch of images attend to each other, precomputed once for each batch shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch

from perl_megatron.model.architecture import VisionArchitecture

Grid = tuple[int, int, int]
"""(time, height, width) of an image in patches."""


@dataclass(frozen=True)
class Segments:
    """N packed tokens in consecutive segments; tokens attend within their segment. Travels as packed_seq_params."""

    cumulative_lengths: torch.Tensor
    """int32 [S + 1], from 0 to N."""
    longest: int
    groups: tuple[torch.Tensor, ...]
    """The segments of each length: int64 [number, length] token indices. Empty where all have one length."""
    inverse: torch.Tensor | None
    """int64 [N]: where each token stands in the concatenation of the groups; None where all have one length."""
    qkv_format: ClassVar[str] = "sbhd"
    """megatron-core's attention then applies the rotary angles to all N tokens at once, not segment by segment."""

    def to(self, device: torch.device) -> Segments:
        """The same on another device."""
        return Segments(
            self.cumulative_lengths.to(device),
            self.longest,
            tuple(group.to(device) for group in self.groups),
            None if self.inverse is None else self.inverse.to(device),
        )


@dataclass(frozen=True)
class VisionSegments:
    """What each block of the vision tower attends over. Travels as packed_seq_params."""

    window: Segments
    full: Segments
    full_attention_blocks: tuple[int, ...]
    qkv_format: ClassVar[str] = "sbhd"

    def of_block(self, block: int) -> Segments:
        """The segments of a 0-based block."""
        return self.full if block in self.full_attention_blocks else self.window


@dataclass(frozen=True)
class VisionPlan:
    """All index work for one batch of images: C merged cells, N = C · merge² patches."""

    order: torch.Tensor
    """int64 [C]: window order → the cells in their original order."""
    inverse: torch.Tensor
    """int64 [C]: the permutation that undoes it."""
    angles: torch.Tensor
    """float32 [N, 1, 1, head_dim]: the 2-D rotary angle of each patch, in window order."""
    segments: VisionSegments

    def to(self, device: torch.device) -> VisionPlan:
        """The same on another device."""
        segments = VisionSegments(
            self.segments.window.to(device), self.segments.full.to(device), self.segments.full_attention_blocks
        )
        return VisionPlan(self.order.to(device), self.inverse.to(device), self.angles.to(device), segments)


def make_segments(lengths: np.ndarray) -> Segments:
    """Segments of these int64 [S] lengths, in this order."""
    ends = np.cumsum(lengths)
    cumulative = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    distinct = np.unique(lengths)
    if len(distinct) == 1:
        return Segments(cumulative, int(distinct[0]), (), None)
    starts = ends - lengths
    groups = [starts[lengths == length][:, None] + np.arange(length) for length in distinct]
    inverse = np.argsort(np.concatenate([group.ravel() for group in groups]))
    return Segments(cumulative, int(distinct[-1]), tuple(map(torch.from_numpy, groups)), torch.from_numpy(inverse))


@dataclass(frozen=True)
class _ImageLayout:
    order: np.ndarray
    """int64 [c]: the image's cells in window order."""
    positions: np.ndarray
    """int64 [c · merge², 2]: (row, column) of each patch, in window order."""
    window_lengths: np.ndarray
    """int64 [windows]: patches in each window."""


@functools.lru_cache(maxsize=1024)
def _image_layout(grid: Grid, merge: int, window: int) -> _ImageLayout:
    """Windows of ``window``² cells, cut off at the image's right and lower edge."""
    time, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    row, column = np.divmod(np.arange(rows * columns), columns)
    window_of_cell = (row // window) * (-(-columns // window)) + column // window
    order = np.argsort(window_of_cell, kind="stable")  # within a window the cells keep their row-major order
    lengths = np.unique(window_of_cell, return_counts=True)[1] * merge**2
    inner_row, inner_column = np.divmod(np.arange(merge**2), merge)
    patch_rows = row[order][:, None] * merge + inner_row
    patch_columns = column[order][:, None] * merge + inner_column
    positions = np.stack([patch_rows.ravel(), patch_columns.ravel()], axis=-1)
    frames = np.arange(time)[:, None] * (rows * columns)
    return _ImageLayout((order + frames).ravel(), np.tile(positions, (time, 1)), np.tile(lengths, time))


@functools.lru_cache(maxsize=16)
def vision_plan(grids: tuple[Grid, ...], vision: VisionArchitecture) -> VisionPlan:
    """The plan for these images, packed in this order. Cached: in training the same shapes come again and again."""
    orders, positions, window_lengths, frame_lengths = [], [], [], []
    first_cell = 0
    for grid, run in groupby(grids):
        number = len(list(run))
        layout = _image_layout(grid, vision.merge_size, vision.cells_per_window)
        cells = len(layout.order)
        orders.append((layout.order + first_cell + cells * np.arange(number)[:, None]).ravel())
        positions.append(np.tile(layout.positions, (number, 1)))
        window_lengths.append(np.tile(layout.window_lengths, number))
        frame_lengths.append(np.full(number * grid[0], grid[1] * grid[2]))
        first_cell += number * cells
    order = np.concatenate(orders)
    return VisionPlan(
        order=torch.from_numpy(order),
        inverse=torch.from_numpy(np.argsort(order)),
        angles=_rotary_angles(torch.from_numpy(np.concatenate(positions)), vision.head_dim),
        segments=VisionSegments(
            window=make_segments(np.concatenate(window_lengths)),
            full=make_segments(np.concatenate(frame_lengths)),
            full_attention_blocks=vision.full_attention_blocks,
        ),
    )


def _rotary_angles(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """2-D rotary angles with base 10^4: the first half of the half-dimensions turns with rows, the second with columns.

    ``positions`` int64 [N, 2] → float32 [N, 1, 1, head_dim].
    """
    axis_dim = head_dim // 2
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, axis_dim, 2, dtype=torch.float32) / axis_dim))
    angles = (positions[..., None].float() * frequencies).flatten(1)
    return torch.cat([angles, angles], dim=-1)[:, None, None]
