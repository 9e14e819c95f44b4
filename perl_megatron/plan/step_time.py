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

Passes are those over the micro-batches that the trainer's planner makes of mean groups (``passes``, ``pass_time``).
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
    sync_seconds,
    update_traffic,
)
from perl_megatron.plan.engine import EngineMemory
from perl_megatron.plan.gpus import Gpu
from perl_megatron.plan.parameters import count, decoded_count, stage_parameters, trained_parts
from perl_megatron.plan.pass_time import PassRoofline, PassTime
from perl_megatron.plan.workload import Workload


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
    view_parts: float
    """Micro-batches of an update that a view is divided over; its prompt and its images are computed in each."""
    image_runs: float
    """How often an image of a question is encoded in an update, by patches."""
    update_flops: float
    """Useful floating-point operations of a step's updates, of all ranks: each group's once, as in a micro-batch of its
    own, and nothing that is computed again."""
    computed_flops: float
    """All that the updates compute: prompts and images in each of a view's micro-batches, and recomputation."""
    model_flops_share: float
    """``update_flops`` as a share of the peak of all devices during the updates."""
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
        self.passes = PassRoofline(config, derived, numbers, workload.group, self.links, flops_per_second=self.flops)

    def step(self, engine: EngineMemory) -> StepTime:
        """All phases of a step."""
        config, derived, assumptions = self.config, self.derived, self.assumptions
        passes = (config.algorithm.old_policy == "trainer") + (config.algorithm.kl_coefficient > 0)
        exchange = self._reference_exchange() if config.algorithm.kl_coefficient > 0 else 0.0
        scored = self.passes.over(derived.questions_per_step, backward=False)
        one_update = self.passes.over(derived.questions_per_update, backward=True)
        update = derived.updates_per_step * (one_update.seconds + self._reduce_and_optimize())
        sync_bytes, sync = sync_seconds(config, derived, self.numbers, self.links, assumptions)
        # Servers are taken to be on nodes of their own.
        is_near = derived.engine != "server" and derived.world_size <= self.gpu.per_node
        useful = self.passes.once(derived.questions_per_step)
        return StepTime(
            generate=self._generate(engine),
            log_probs=passes * scored.seconds + exchange,
            reference_exchange=exchange,
            update=update,
            sync=sync,
            sync_bytes=sync_bytes,
            sleep=2 * engine.share.host / (self._sleep_gb * 1e9),
            bubble=one_update.waiting,
            micro_batches=one_update.plan.num_micro_batches,
            view_parts=one_update.plan.view_parts,
            image_runs=one_update.plan.image_runs,
            update_flops=useful,
            computed_flops=derived.updates_per_step * one_update.flops,
            model_flops_share=useful / (update * self.peak * derived.world_size),
            traffic=(
                *self._traffic(passes, scored, one_update),
                Traffic("weight sync", sync_bytes, is_near, sync),
            ),
            overlapped=config.rollout.max_staleness > 0,
        )

    @property
    def _sleep_gb(self) -> float:
        """GB/s of a sleeping engine's weights: vLLM's host memory is pinned, the embedded engine's is not."""
        return self.assumptions.pinned_copy_gb if self.derived.engine == "vllm" else self.assumptions.host_copy_gb

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

    def _traffic(self, passes: int, scored: PassTime, update: PassTime) -> list[Traffic]:
        """Of the rank that sends most along each axis: ``passes`` for log-probabilities, and all updates."""
        config, derived, numbers = self.config, self.derived, self.numbers
        most = dict.fromkeys(("tensor", "pipeline", "context", "data"), 0.0)
        for stage in range(derived.pipeline_size):
            gradients = model_parallel_gradients(config, derived, numbers, stage)
            gradients["data"] = update_traffic(config, derived, numbers, stage)
            for axis in most:
                of_update = getattr(update.sent[stage], axis, 0.0) + gradients.get(axis, 0.0)
                of_passes = passes * getattr(scored.sent[stage], axis, 0.0)
                most[axis] = max(most[axis], of_passes + derived.updates_per_step * of_update)
        return [
            Traffic(axis, sent, self.links.within_node(axis), self.links.seconds(axis, sent))
            for axis, sent in most.items()
        ]
