"""A mini-batch's sequences as this rank's micro-batches: which belong together, and how they lie in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.micro_batches import plan_micro_batches
from perl_megatron.batching.work import views_of
from perl_megatron.config.layout import length_multiple, micro_batch_multiple
from perl_megatron.config.schema import ActorSection, ParallelConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.runtime import platform
from perl_megatron.runtime.topology import Topology
from perl_megatron.train.batch import MicroBatch, TrainingSequence
from perl_megatron.train.grid import lay_out_rows
from perl_megatron.train.packed import lay_out_packed


class BatchLayout:
    """Plans and lays out micro-batches, the same way for log-probabilities and updates.

    Args:
        encoder: gives the pixels of the images that prompts name.
        cost: of a micro-batch, under what is shared (`actor.sharing`).
        actor: how large a micro-batch is.
        parallel: the layout.
        alignment: each rank's part of a padded row is a multiple of it.
    """

    def __init__(
        self,
        topology: Topology,
        encoder: PromptEncoder,
        cost: CostModel,
        *,
        actor: ActorSection,
        parallel: ParallelConfig,
        alignment: int = 1,
    ):
        self._topology = topology
        self._encoder = encoder
        self._cost = cost
        self._token_budget = actor.micro_batch_tokens
        self._parallel = parallel
        self._length_multiple = length_multiple(parallel) * alignment

    def plan(self, sequences: Sequence[TrainingSequence]) -> list[tuple[int, ...]]:
        """The places in ``sequences`` of each micro-batch of this data-parallel rank; as many on every rank."""
        views = views_of([one.prompt for one in sequences], [len(one.response) for one in sequences])
        plan = plan_micro_batches(
            views,
            self._cost,
            token_budget=self._token_budget,
            data_size=self._topology.data_size,
            stages=self._topology.pipeline_size,
            multiple=micro_batch_multiple(self._parallel),
        )
        return plan[self._topology.data_rank]

    def lay_out(
        self, sequences: Sequence[TrainingSequence], indices: Sequence[int], *, with_images: bool
    ) -> MicroBatch:
        """One micro-batch of the plan, on the device; ``with_images`` for the model chunk that encodes them."""
        lay_out: Callable[..., MicroBatch] = lay_out_packed
        if self._cost.sharing != "full":
            context = (self._topology.context_rank, self._topology.context_size)
            lay_out = partial(lay_out_rows, share_images=self._cost.sharing == "vision", context=context)
        return lay_out(
            sequences,
            indices,
            length_multiple=self._length_multiple,
            pad_token_id=self._encoder.pad_token_id,
            patches=self._encoder.patches if with_images else None,
            device=platform.device(),
        )
