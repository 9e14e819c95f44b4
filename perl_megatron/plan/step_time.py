"""How long a step of training takes by a roofline: arithmetic, memory traffic and messages at shares of their peaks.

NO MEASUREMENT. Phases follow each other, as in the loop (with rollout.max_staleness = 1 generation runs beside the
update, and only the longer of the two counts):

- generate: prompts at the rate of matrix products; then each token of all running sequences takes the longer of its
  arithmetic and of reading weights, keys and values once, plus what vLLM's scheduler and all-reduces take.
- log-probabilities: a forward pass over all responses for log π_old (algorithm.old_policy = trainer), and one for
  log π_ref (kl_coefficient > 0), for which the weights of this rank are exchanged with host memory twice.
- update: forward and backward passes, gradients, optimizer (20 bytes of memory traffic a number), all-gather.
- sync: weights to the engine.

A pass through a pipeline of P stages, V chunks each: (m + (P - 1)/V) times the slowest stage's micro-batch, m of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from perl_megatron.batching.cost import CostModel
from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.plan.activations import bytes_of_number
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.communication import (
    Links,
    Traffic,
    model_parallel_gradients,
    pass_traffic,
    sync_seconds,
    update_traffic,
)
from perl_megatron.plan.engine import EngineMemory
from perl_megatron.plan.gpus import Gpu
from perl_megatron.plan.parameters import count, stage_parameters, total_count, trained_parts
from perl_megatron.plan.workload import Workload, size_of

OPTIMIZER_TRAFFIC = 20
"""Bytes of memory traffic for a number that is optimized: gradient, two moments read and written, weight."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and what they are made of."""

    generate: float
    log_probs: float
    reference_exchange: float
    """Weights between device and host, for log π_ref; part of ``log_probs``."""
    update: float
    sync: float
    sync_bytes: float
    bubble: float
    """Share of the update that pipeline stages wait while it fills and drains."""
    micro_batches: int
    """Of each data-parallel rank in an update of mean groups."""
    update_flops: float
    """Floating-point operations of a step's updates, of all ranks; what recomputation repeats is not in it."""
    model_flops_share: float
    """Of the peak of all devices, in the update."""
    traffic: tuple[Traffic, ...]
    overlapped: bool
    """Whether generation runs beside the update."""

    @property
    def total(self) -> float:
        """Seconds of a whole step."""
        learn = self.log_probs + self.update
        return self.sync + (max(self.generate, learn) if self.overlapped else self.generate + learn)

    def as_json(self) -> dict[str, Any]:
        """All numbers, with ``total``."""
        return {**asdict(self), "total": self.total}


class Roofline:
    """Times of a config's phases on a device."""

    def __init__(
        self,
        config: Config,
        derived: Derived,
        numbers: ArchitectureNumbers,
        workload: Workload,
        gpu: Gpu,
        assumptions: Assumptions,
    ):
        self.config, self.derived, self.numbers = config, derived, numbers
        self.workload, self.gpu, self.assumptions = workload, gpu, assumptions
        self.links = Links(derived, gpu, assumptions)
        peak = gpu.flops if config.model.dtype == "bfloat16" else gpu.flops_float32
        self.flops = peak * assumptions.matmul_efficiency
        self.peak, self.bandwidth = peak, gpu.bandwidth * assumptions.bandwidth_efficiency

    def step(self, engine: EngineMemory) -> StepTime:
        """All phases of a step."""
        config, derived, assumptions = self.config, self.derived, self.assumptions
        passes = (config.algorithm.old_policy == "trainer") + (config.algorithm.kl_coefficient > 0)
        exchange = self._reference_exchange() if config.algorithm.kl_coefficient > 0 else 0.0
        scored, _ = self._pass(backward=False, groups=derived.questions_per_step)
        one_update, bubble = self._pass(backward=True, groups=derived.questions_per_update)
        update = derived.updates_per_step * (one_update + self._reduce_and_optimize())
        sync_bytes, sync = sync_seconds(config, derived, self.numbers, self.links, assumptions)
        flops = derived.questions_per_step * self._group_flops(backward=True)
        return StepTime(
            generate=self._generate(engine),
            log_probs=passes * scored + exchange,
            reference_exchange=exchange,
            update=update,
            sync=sync,
            sync_bytes=sync_bytes,
            bubble=bubble,
            micro_batches=self.workload.micro_batches,
            update_flops=flops,
            model_flops_share=flops / (update * self.peak * derived.world_size),
            traffic=tuple(self._traffic(passes, sync_bytes, sync)),
            overlapped=config.rollout.max_staleness > 0,
        )

    def _group_flops(self, *, backward: bool) -> float:
        trains_images = bool(trained_parts(self.config.optimizer) & {"vision", "merger"})
        cost = CostModel(self.numbers, self.config.actor.sharing, backward=backward, vision_backward=trains_images)
        return cost.flops(self.workload.group).total

    def _stage_seconds(self, groups: float, *, backward: bool) -> list[float]:
        """Of each stage for so many groups, whatever micro-batches they are in: arithmetic and messages."""
        config, derived, numbers = self.config, self.derived, self.numbers
        trains_images = bool(trained_parts(config.optimizer) & {"vision", "merger"})
        cost = CostModel(numbers, config.actor.sharing, backward=backward, vision_backward=trains_images)
        forward = CostModel(numbers, config.actor.sharing, backward=False).flops(self.workload.group)
        flops = cost.flops(self.workload.group)
        again = backward and config.model.recompute == "full"
        language = flops.prompt + flops.response + flops.padding
        if again:
            language += forward.prompt + forward.response + forward.padding
        vision = flops.vision + (forward.vision if again and trains_images else 0)
        size = size_of(self.workload.group, cost)
        ranks = derived.tensor_size * derived.context_size
        seconds = []
        for stage, layers in enumerate(derived.stage_layers):
            work = language * layers / numbers.num_layers / ranks
            work += vision / derived.tensor_size if stage == 0 else 0
            work += flops.loss / ranks if stage == derived.pipeline_size - 1 else 0
            sent = pass_traffic(
                config, derived, numbers, stage, tokens=size.tokens, patches=size.patches, backward=backward
            )
            messages = sum(self.links.seconds(axis, getattr(sent, axis)) for axis in ("tensor", "context", "pipeline"))
            seconds.append(groups * (work / self.flops + messages))
        return seconds

    def _pass(self, *, backward: bool, groups: int) -> tuple[float, float]:
        """(seconds, share of them that stages wait) of a pass over a data-parallel rank's share of some groups."""
        derived = self.derived
        views = groups * len(self.workload.group)
        # Whole views are dealt; the rank with most decides.
        share = -(-views // derived.data_size) / len(self.workload.group)
        number = max(1, round(self.workload.micro_batches * groups / derived.questions_per_update))
        slowest = max(self._stage_seconds(share, backward=backward))
        waiting = (derived.pipeline_size - 1) / derived.virtual_pipeline_size
        return slowest * (1 + waiting / number), waiting / (number + waiting)

    def _reduce_and_optimize(self) -> float:
        """Seconds of one update beside its passes: the slowest stage's."""
        config, derived, numbers = self.config, self.derived, self.numbers
        seconds = []
        for stage in range(derived.pipeline_size):
            sent = self.links.seconds("data", update_traffic(config, derived, numbers, stage))
            sent += self.links.seconds("pipeline", model_parallel_gradients(config, derived, numbers, stage))
            trained = count(stage_parameters(numbers, config.parallel, stage), trained_parts(config.optimizer))
            shards = derived.data_size * derived.context_size if config.optimizer.distributed else 1
            seconds.append(sent + OPTIMIZER_TRAFFIC * trained / shards / self.bandwidth)
        return max(seconds)

    def _reference_exchange(self) -> float:
        """In and out again, each a copy to the host and one from it, of the stage with most."""
        config, numbers = self.config, self.numbers
        most = max(
            count(stage_parameters(numbers, config.parallel, stage)) for stage in range(config.parallel.pipeline)
        )
        return 4 * bytes_of_number(config) * most / (self.assumptions.host_copy_gb * 1e9)

    def _generate(self, engine: EngineMemory) -> float:
        derived, work, numbers = self.derived, self.workload, self.numbers
        drawn = derived.questions_per_step / self.assumptions.kept_share
        replicas = derived.engine_replicas
        sequences = drawn * derived.group_size / replicas
        running = max(1.0, min(engine.concurrent_sequences, sequences))
        prefill = CostModel(numbers, backward=False)
        view = prefill.tokens_flops(work.prompt_tokens) + sum(
            prefill.image_flops(patches) for _, patches in work.group[0].images
        )
        prompts = drawn * derived.views_per_question / replicas * view / engine.tensor_size / self.flops
        model = total_count(numbers)
        context = work.prompt_tokens + work.response_tokens / 2
        read = engine.weights + running * context * engine.cache_per_token
        arithmetic = 2 * model * running / engine.tensor_size / self.flops
        token = max(read / self.bandwidth, arithmetic) + self.assumptions.decode_overhead_ms / 1e3
        if engine.tensor_size > 1:
            token += 2 * numbers.num_layers * self.assumptions.all_reduce_us / 1e6
        # Sequences take each other's places; in the end the longest runs on with ever fewer others.
        longest = self.config.rollout.max_response_tokens
        tokens = max(sequences * work.response_tokens / running, work.response_tokens)
        return prompts + (tokens + longest - work.response_tokens) * token

    def _traffic(self, passes: int, sync_bytes: float, sync: float) -> list[Traffic]:
        config, derived, numbers = self.config, self.derived, self.numbers
        size = size_of(self.workload.group, CostModel(numbers, config.actor.sharing))
        groups = derived.questions_per_step / derived.data_size
        kinds = dict.fromkeys(("tensor", "pipeline", "context"), 0.0)
        for stage in range(derived.pipeline_size):
            both = [
                pass_traffic(
                    config, derived, numbers, stage, tokens=size.tokens, patches=size.patches, backward=backward
                )
                for backward in (False, True)
            ]
            for axis, most in kinds.items():
                kinds[axis] = max(most, groups * (passes * getattr(both[0], axis) + getattr(both[1], axis)))
        stages = range(derived.pipeline_size)
        kinds["data"] = derived.updates_per_step * max(
            update_traffic(config, derived, numbers, stage) for stage in stages
        )
        rows = [
            Traffic(axis, sent, self.links.within_node(axis), self.links.seconds(axis, sent))
            for axis, sent in kinds.items()
        ]
        return [*rows, Traffic("weight sync", sync_bytes, derived.world_size <= self.gpu.per_node, sync)]
