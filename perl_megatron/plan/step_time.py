"""How long a step of training takes by a roofline: arithmetic, memory traffic and messages at shares of their peaks.

NO MEASUREMENT. Phases follow each other, as in the loop (with rollout.max_staleness = 1 generation runs beside the
update, and only the longer of the two counts):

- generate: prompts at the rate of matrix products; then each token of all running sequences takes the longer of its
  arithmetic and of reading the language model's weights, keys and values once, plus what vLLM's scheduler and
  all-reduces take.
- log-probabilities: a forward pass over all responses for log π_old (algorithm.old_policy = trainer), and one for
  log π_ref (kl_coefficient > 0), for which the weights of this rank are exchanged with host memory twice.
- update: forward and backward passes, what recomputation repeats, gradients, optimizer, all-gather.
- sync: weights to the engine. Where it sleeps meanwhile, its weights go to pinned host memory and back.

A pass through a pipeline of P stages, V chunks each: (m + (P - 1)/V) times the slowest stage's micro-batch, m of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from perl_megatron.batching.cost import CostModel, Flops
from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.plan.activations import bytes_of_number
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.communication import (
    Links,
    PassTraffic,
    Traffic,
    model_parallel_gradients,
    pass_traffic,
    sync_seconds,
    update_traffic,
)
from perl_megatron.plan.engine import EngineMemory
from perl_megatron.plan.gpus import Gpu
from perl_megatron.plan.parameters import count, decoded_count, stage_parameters, trained_parts
from perl_megatron.plan.workload import MicroBatchSize, Workload, most_patches, size_of


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
    sleep: float
    """Weights of a colocated engine between device and host."""
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
        return self.sync + self.sleep + (max(self.generate, learn) if self.overlapped else self.generate + learn)

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
        # Merger and language model alone send nothing back through the tower.
        self.trains_images = "vision" in trained_parts(config.optimizer)
        # Of a micro-batch's images, that of the tensor-parallel rank with most.
        images = workload.images_of_micro_batch
        is_dealt = config.parallel.vision == "replicated"
        most = most_patches(images, 1, derived.tensor_size) / images
        self.image_share = most if is_dealt else 1 / derived.tensor_size

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
            sleep=2 * engine.share.host / (self._sleep_gb * 1e9),
            bubble=bubble,
            micro_batches=self.workload.micro_batches,
            update_flops=flops,
            model_flops_share=flops / (update * self.peak * derived.world_size),
            traffic=tuple(self._traffic(passes, sync_bytes, sync)),
            overlapped=config.rollout.max_staleness > 0,
        )

    @property
    def _sleep_gb(self) -> float:
        """GB/s of a sleeping engine's weights: vLLM's host memory is pinned, the embedded engine's is not."""
        return self.assumptions.pinned_copy_gb if self.derived.engine == "vllm" else self.assumptions.host_copy_gb

    def _group_flops(self, *, backward: bool) -> float:
        return self._cost(backward=backward).flops(self.workload.group).total

    def _cost(self, *, backward: bool) -> CostModel:
        return CostModel(self.numbers, self.config.actor.sharing, backward=backward, vision_backward=self.trains_images)

    def _repeated(self) -> Flops:
        """What recomputation computes again of the mean group: all layers, or the attention alone."""
        forward, group = self._cost(backward=False), self.workload.group
        repeated = {
            "none": Flops(),
            "selective": forward.attention_flops(group),
            "full": replace(forward.flops(group), loss=0),
        }[self.config.model.recompute]
        return repeated if self.trains_images else replace(repeated, vision=0)

    def _stage_seconds(self, groups: float, *, backward: bool) -> list[float]:
        """Of each stage for so many groups, whatever micro-batches they are in: arithmetic and messages."""
        derived, numbers = self.derived, self.numbers
        cost = self._cost(backward=backward)
        parts = [cost.flops(self.workload.group), *([self._repeated()] if backward else [])]
        language = sum(part.prompt + part.response + part.padding for part in parts)
        vision, loss = sum(part.vision for part in parts), sum(part.loss for part in parts)
        size = size_of(self.workload.group, cost)
        ranks = derived.tensor_size * derived.context_size
        seconds = []
        for stage, layers in enumerate(derived.stage_layers):
            work = language * layers / numbers.num_layers / ranks
            work += vision * self.image_share if stage == 0 else 0
            work += loss / ranks if stage == derived.pipeline_size - 1 else 0
            sent = self._sent(stage, size, backward=backward)
            messages = sum(self.links.seconds(axis, getattr(sent, axis)) for axis in ("tensor", "context", "pipeline"))
            seconds.append(groups * (work / self.flops + messages))
        return seconds

    def _sent(self, stage: int, size: MicroBatchSize, *, backward: bool) -> PassTraffic:
        return pass_traffic(
            self.config,
            self.derived,
            self.numbers,
            stage,
            tokens=size.tokens,
            patches=size.patches,
            share=self.image_share,
            backward=backward,
        )

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
        has_copy = config.model.dtype == "bfloat16"
        bytes_of_one = self.assumptions.adam_bytes + (self.assumptions.weight_copy_bytes if has_copy else 0.0)
        seconds = []
        for stage in range(derived.pipeline_size):
            sent = self.links.seconds("data", update_traffic(config, derived, numbers, stage))
            for axis, num_bytes in model_parallel_gradients(config, derived, numbers, stage).items():
                sent += self.links.seconds(axis, num_bytes)
            trained = count(stage_parameters(numbers, config.parallel, stage), trained_parts(config.optimizer))
            shards = derived.data_size * derived.context_size if config.optimizer.distributed else 1
            seconds.append(sent + bytes_of_one * trained / shards / self.bandwidth)
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
        weights = decoded_count(numbers) / engine.tensor_size
        context = work.prompt_tokens + work.response_tokens / 2
        read = bytes_of_number(self.config) * weights + running * context * engine.cache_per_token
        arithmetic = 2 * weights * running / self.flops
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
        most = dict.fromkeys(("tensor", "pipeline", "context", "data"), 0.0)
        for stage in range(derived.pipeline_size):
            forward, both = (self._sent(stage, size, backward=backward) for backward in (False, True))
            gradients = model_parallel_gradients(config, derived, numbers, stage)
            gradients["data"] = update_traffic(config, derived, numbers, stage)
            for axis in most:
                of_passes = passes * getattr(forward, axis, 0.0) + getattr(both, axis, 0.0)
                of_updates = derived.updates_per_step * gradients.get(axis, 0.0)
                most[axis] = max(most[axis], groups * of_passes + of_updates)
        rows = [
            Traffic(axis, sent, self.links.within_node(axis), self.links.seconds(axis, sent))
            for axis, sent in most.items()
        ]
        # Servers are taken to be on nodes of their own.
        is_near = derived.engine != "server" and derived.world_size <= self.gpu.per_node
        return [*rows, Traffic("weight sync", sync_bytes, is_near, sync)]
