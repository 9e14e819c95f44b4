"""How long a pass through the policy takes by the roofline, micro-batch by micro-batch. No torch, NO MEASUREMENT.

A data-parallel rank works on its micro-batches one after the other; the rank that takes longest decides. Micro-batches
may differ in size. Through a pipeline of P stages, V chunks each, they take

    max over stages of (Σ of all micro-batches + (P - 1)/V · the largest)

so the stages are taken to wait for the largest while the pipeline fills and drains, as the trainer's planner does
(``batching.cost.step_flops``). Of m equal ones this is (m + (P - 1)/V) times one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perl_megatron.batching.cost import CostModel, Flops
from perl_megatron.batching.work import ViewWork
from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.derive_model import fp8_alignment
from perl_megatron.config.layout import length_multiple, micro_batch_multiple
from perl_megatron.config.schema import Config
from perl_megatron.plan.communication import Links, PassTraffic, pass_traffic
from perl_megatron.plan.parameters import trained_parts
from perl_megatron.plan.passes import PassPlan, RankWork, Views, plan_pass
from perl_megatron.plan.workload import size_of

AXES = ("tensor", "context", "pipeline")
"""Along which messages are sent during a pass."""


@dataclass(frozen=True)
class PassTime:
    """A pass over some questions."""

    seconds: float
    waiting: float
    """Share of them that stages wait while the pipeline fills and drains."""
    flops: float
    """All that all ranks compute: prompts and images in each micro-batch that has them, and recomputation."""
    sent: tuple[PassTraffic, ...]
    """For each stage the bytes of the rank that sends most."""
    plan: PassPlan


class PassRoofline:
    """Times of passes on a device.

    Args:
        group: the mean group of a question.
        flops_per_second: that a process reaches.
    """

    def __init__(
        self,
        config: Config,
        derived: Derived,
        numbers: ArchitectureNumbers,
        group: Views,
        links: Links,
        *,
        flops_per_second: float,
    ):
        self.config, self.derived, self.numbers, self.group = config, derived, numbers, group
        self.links, self.flops_per_second = links, flops_per_second
        # Merger and language model alone send nothing back through the tower.
        self.trains_images = "vision" in trained_parts(config.optimizer)
        self._multiple = length_multiple(config.parallel) * fp8_alignment(config.model)

    def over(self, questions: int, *, backward: bool) -> PassTime:
        """Forwards, or forwards and backwards, over so many groups."""
        config, derived = self.config, self.derived
        plan = plan_pass(
            self.numbers,
            self.group,
            questions,
            sharing=config.actor.sharing,
            vision_backward=self.trains_images,
            token_budget=config.actor.micro_batch_tokens,
            data_size=derived.data_size,
            stages=derived.pipeline_size,
            multiple=micro_batch_multiple(config.parallel),
        )
        seconds, waiting = max(self._seconds(rank, backward=backward) for rank in plan.ranks)
        flops = sum(
            rank.num_ranks * count * sum(part.total for part in self._flops(views, backward=backward))
            for rank in plan.ranks
            for views, count in rank.micro_batches
        )
        sent = tuple(self._most_sent(plan, stage, backward=backward) for stage in range(derived.pipeline_size))
        return PassTime(seconds, waiting / seconds if seconds else 0.0, flops, sent, plan)

    def once(self, questions: int) -> float:
        """Floating-point operations of forward and backward passes with each group as one micro-batch of its own."""
        return questions * self._cost(backward=True).flops(self.group).total

    def _cost(self, *, backward: bool) -> CostModel:
        return CostModel(self.numbers, self.config.actor.sharing, backward=backward, vision_backward=self.trains_images)

    def _flops(self, views: Sequence[ViewWork], *, backward: bool) -> list[Flops]:
        """Of a micro-batch: its passes, and what recomputation computes again."""
        found = [self._cost(backward=backward).flops(views)]
        if not backward or self.config.model.recompute == "none":
            return found
        forward = self._cost(backward=False)
        is_full = self.config.model.recompute == "full"
        again = replace(forward.flops(views), loss=0) if is_full else forward.attention_flops(views)
        return [*found, again if self.trains_images else replace(again, vision=0)]

    def _seconds(self, rank: RankWork, *, backward: bool) -> tuple[float, float]:
        """(seconds, those of them that stages wait) of a rank's micro-batches."""
        waiting = (self.derived.pipeline_size - 1) / self.derived.virtual_pipeline_size
        each = [(self._stage_seconds(views, backward=backward), count) for views, count in rank.micro_batches]
        if not each:
            return 0.0, 0.0
        found = []
        for stage in range(self.derived.pipeline_size):
            largest = max(seconds[stage] for seconds, _ in each)
            work = sum(count * seconds[stage] for seconds, count in each)
            found.append((work + waiting * largest, waiting * largest))
        return max(found)

    def _stage_seconds(self, views: Views, *, backward: bool) -> list[float]:
        """Arithmetic and messages of a micro-batch on each stage."""
        derived, parts = self.derived, self._flops(views, backward=backward)
        language = sum(part.prompt + part.response + part.padding for part in parts)
        vision, loss = sum(part.vision for part in parts), sum(part.loss for part in parts)
        ranks = derived.tensor_size * derived.context_size
        seconds = []
        for stage, layers in enumerate(derived.stage_layers):
            work = language * layers / self.numbers.num_layers / ranks
            work += vision * self._image_share(views) if stage == 0 else 0
            work += loss / ranks if stage == derived.pipeline_size - 1 else 0
            sent = self._sent(views, stage, backward=backward)
            messages = sum(self.links.seconds(axis, getattr(sent, axis)) for axis in AXES)
            seconds.append(work / self.flops_per_second + messages)
        return seconds

    def _image_share(self, views: Views) -> float:
        """Of a micro-batch's images, that of the tensor-parallel rank with most."""
        tensor = self.derived.tensor_size
        num_images = len(self._cost(backward=False).encoded_images(views))
        if self.config.parallel.vision == "replicated" and num_images:
            return -(-num_images // tensor) / num_images
        return 1 / tensor

    def _sent(self, views: Views, stage: int, *, backward: bool) -> PassTraffic:
        size = size_of(views, self._cost(backward=backward), multiple=self._multiple)
        return pass_traffic(
            self.config,
            self.derived,
            self.numbers,
            stage,
            tokens=size.tokens,
            patches=size.patches,
            share=self._image_share(views),
            backward=backward,
        )

    def _most_sent(self, plan: PassPlan, stage: int, *, backward: bool) -> PassTraffic:
        most = dict.fromkeys(AXES, 0.0)
        for rank in plan.ranks:
            each = [(self._sent(views, stage, backward=backward), count) for views, count in rank.micro_batches]
            for axis in AXES:
                most[axis] = max(most[axis], sum(count * getattr(sent, axis) for sent, count in each))
        return PassTraffic(**most)
