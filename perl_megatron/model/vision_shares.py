"""Which tensor-parallel rank encodes which images, where each of them holds the whole vision tower; and the exchange.

An image's features do not depend on the other images, so the ranks need not encode the same ones. Each takes a share,
and all get all features. Of a feature's gradient every rank has the whole: the language model is tensor-parallel, with
or without sequence parallelism, and gives its input's gradient whole to each rank. So a rank goes on with the rows of
its own images, and the gradients of the tower's parameters are sums over a rank's images: they are added up over the
ranks once a step, when all micro-batches are done (``train/optimizer.py``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.packing import deal
from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.model.segments import Grid


@dataclass(frozen=True)
class ImageShare:
    """What one of several ranks encodes of C merged cells, and where it finds those of the others."""

    images: tuple[int, ...]
    """Its images, ascending; a rank may have none."""
    cells: torch.Tensor
    """int64 [own C]: its rows of the cells, ascending."""
    longest: int
    """Cells of the rank that has most."""
    places: torch.Tensor
    """int64 [C]: where each cell is when the features of all ranks, ``longest`` rows each, follow one another."""

    def to(self, device: torch.device) -> ImageShare:
        """The same on another device."""
        return ImageShare(self.images, self.cells.to(device), self.longest, self.places.to(device))


@functools.lru_cache(maxsize=16)
def share_images(grids: tuple[Grid, ...], numbers: ArchitectureNumbers, rank: int, size: int) -> ImageShare:
    """The share of ``rank`` of ``size``, balanced by what the images cost. Cached, as ``segments.vision_plan`` is.

    Depends on nothing but the arguments: all ranks come to the same owners.
    """
    cost = CostModel(numbers)
    # A patch attends within its frame.
    costs = [time * cost.image_flops(height * width) for time, height, width in grids]
    owners = np.empty(len(grids), dtype=np.int64)
    for owner, images in enumerate(deal(costs, size, len(grids))):
        owners[images] = owner
    cells = np.array(grids).prod(axis=1) // numbers.vision_merge_size**2
    owner_of_cell = np.repeat(owners, cells)
    counts = np.bincount(owner_of_cell, minlength=size)
    longest = int(counts.max())
    places = np.empty(len(owner_of_cell), dtype=np.int64)
    by_owner = np.argsort(owner_of_cell, kind="stable")
    places[by_owner] = np.concatenate([start * longest + np.arange(count) for start, count in enumerate(counts)])
    return ImageShare(
        images=tuple(np.flatnonzero(owners == rank).tolist()),
        cells=torch.from_numpy(np.flatnonzero(owner_of_cell == rank)),
        longest=longest,
        places=torch.from_numpy(places),
    )


def exchange(own: torch.Tensor, share: ImageShare, group: dist.ProcessGroup) -> torch.Tensor:
    """[own C, H] of this rank → [C, H] of all ranks, in the order of the cells. A collective of ``group``.

    The gradient that comes back must be whole, and the same on all ranks.
    """
    return _Exchange.apply(own, share, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, share: ImageShare, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.cells = share.cells
        # Equally many rows from each rank, as gloo wants them; those behind a rank's own mean nothing.
        filled = own.new_empty(share.longest, own.shape[1])
        filled[: len(own)] = own
        gathered = own.new_empty(group.size() * share.longest, own.shape[1])
        dist.all_gather_into_tensor(gathered, filled, group=group)
        return gathered[share.places]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient[ctx.cells], None, None


def mark_partial_gradients(module: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Every rank of ``group`` holds all of ``module``, and each has a part of every gradient."""
    for parameter in module.parameters():
        parameter.gradient_group = group  # type: ignore[attr-defined]
        # megatron-core's layers mark their biases, TransformerEngine's their weights too, whatever the group's size.
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def gradient_group(parameter: torch.nn.Parameter) -> dist.ProcessGroup | None:
    """Over whose ranks the parameter's gradient is to be added up, beside the data-parallel ones; None for most."""
    return getattr(parameter, "gradient_group", None)
