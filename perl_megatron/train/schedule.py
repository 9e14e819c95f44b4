"""One pass of a global list of sequences through megatron-core's schedules, and the agreement of all ranks on results.

Every rank is given the same sequences; a data-parallel rank takes its share, its pipeline stages work on it together,
each context rank on its part of every sequence, and only the last stage sees the final hidden states. What it finds
reaches all ranks by a sum in which each value has exactly one contributor (so values arrive bit for bit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from perl_megatron.runtime import platform
from perl_megatron.runtime.topology import Topology
from perl_megatron.train.batch import MicroBatch, TrainingSequence
from perl_megatron.train.batch_layout import BatchLayout
from perl_megatron.train.losses import Sums

MicroBatchLoss = Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]]
"""(micro-batch, final hidden states [T, H]) to (scalar loss, what to keep of it)."""


class Schedule:
    """Drives forward and backward passes over a rank's micro-batches.

    Args:
        chunks: this rank's model chunks, as megatron-core's schedules take them.
        layout: plans and lays out the micro-batches.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], topology: Topology, layout: BatchLayout):
        self._chunks = list(chunks)
        self._topology = topology
        self._layout = layout

    def run(
        self, sequences: Sequence[TrainingSequence], loss: MicroBatchLoss, *, forward_only: bool
    ) -> list[tuple[MicroBatch, Sums]]:
        """Pass this rank's share through the model; gradients are added up unless ``forward_only``.

        Returns what ``loss`` kept of each micro-batch; empty on all but the last pipeline stage.
        """
        plan = self._layout.plan(sequences)
        with torch.set_grad_enabled(not forward_only):
            return get_forward_backward_func()(
                forward_step_func=partial(_forward_step, loss),
                data_iterator=[
                    self._laid_out(sequences, plan, with_images=self._topology.is_first_stage and chunk == 0)
                    for chunk in range(len(self._chunks))
                ],
                model=self._chunks,
                num_microbatches=len(plan),
                # Both unused: pipeline stages send the shape of each micro-batch (``variable_seq_lengths``).
                seq_length=1,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _laid_out(
        self, sequences: Sequence[TrainingSequence], plan: Sequence[Sequence[int]], *, with_images: bool
    ) -> Iterator[MicroBatch]:
        """A model chunk's micro-batches, each laid out when it is needed (pixels of all at once would be large)."""
        for indices in plan:
            yield self._layout.lay_out(sequences, indices, with_images=with_images)


def _forward_step(
    loss: MicroBatchLoss, batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """megatron-core's callback: the model's output, and what turns it into a loss on the last stage."""
    batch = next(batches)
    output = model(batch.token_ids, batch.position_ids, batch.vision, batch.output_places, batch.shared_prompts)

    def finish(hidden: Tensor) -> tuple[Tensor, Tensor, tuple[MicroBatch, Sums]]:
        value, kept = loss(batch, hidden)
        # The count would divide the gradient; the losses are normalised already (see ``train/optimizer.py``).
        # megatron-core holds what is kept until the pass over all micro-batches ends: no pixels, no attention masks.
        slim = replace(batch, vision=None, shared_prompts=None)
        return value, torch.ones((), dtype=torch.int, device=value.device), (slim, kept)

    return output, finish


def contributes(topology: Topology) -> bool:
    """Whether this rank's results count: the last stage's (its tensor ranks all hold the same, so one of them)."""
    return topology.is_last_stage and topology.tensor_rank == 0


def add_up(names: Sequence[str], parts: Sequence[Sums], topology: Topology) -> dict[str, float]:
    """The sums of all micro-batches of all ranks, on every rank; names ending in ``_max`` take the maximum."""
    own = torch.zeros(2, len(names), dtype=torch.float64, device=platform.device())
    if contributes(topology):
        for part in parts:
            values = torch.stack([part[name] for name in names])
            own[0] += values
            own[1] = torch.maximum(own[1], values)
    dist.all_reduce(own[0])
    dist.all_reduce(own[1], op=dist.ReduceOp.MAX)
    sums, maxima = own.tolist()
    return {
        name: maximum if name.endswith("_max") else total
        for name, total, maximum in zip(names, sums, maxima, strict=True)
    }
