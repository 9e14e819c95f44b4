"""The memory of a rank of each pipeline stage: what lies there throughout, and what comes on top. No torch.

    process + parameters + gradients + optimizer                                                        (throughout)
    + the most of what the phases of a step add:
      update: activations with the work of a backward pass, or temporaries of the optimizer; and the sleeping engine
      weight sync: two buckets of weights, and the engine without its cache
      generate: the engine

Parameters, gradients and optimizer are exact (``parameters``, ``buffers``); activations are ``activations``'s for the
largest micro-batches that the config allows, times those that the schedule has in flight; the engine is ``engine``'s,
whole in all phases where it does not sleep; the rest are assumptions. The forward passes for log-probabilities keep
nothing, so that they take less than the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config, OptimizerSection, ParallelConfig
from perl_megatron.plan.activations import SINGLE, Activations, Modules, activations, bytes_of_number
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.buffers import Bucket, buckets, buffer_size, largest_optimized
from perl_megatron.plan.engine import EngineShare
from perl_megatron.plan.gpus import GIB, Gpu
from perl_megatron.plan.host_memory import HostMemory, host_memory
from perl_megatron.plan.parameters import chunk_parameters, count, stage_parameters, total_count, trained_parts
from perl_megatron.plan.workload import MicroBatchSize, Workload


@dataclass(frozen=True)
class Static:
    """Bytes of a rank that lie there from the start to the end; exact."""

    num_parameters: int
    num_trained: int
    num_joined: int
    """Of the trained ones, those in gate and up matrices."""
    parameters: int
    gradients: int
    optimizer: int
    """Two moments in float32 for each number that the rank optimizes, and a float32 copy of 16-bit parameters; of the
    data-parallel rank that has most."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of one stage."""

    stage: int
    static: Static
    micro_batches_in_flight: float
    """In micro-batches of the whole stage; a model chunk's count by its layers."""
    images_in_flight: int
    """Micro-batches whose images the stage holds; 0 on all but the first."""
    activations: float
    """Kept of all micro-batches in flight: language model, and output head."""
    vision_activations: float
    work: float
    """The most that one step of the backward pass allocates beside: a layer's gradients, or the loss kernel's tiles."""
    synchronization: float
    """Buckets of weights on their way to the engine."""
    least_synchronization: float
    """The same with the smallest rollout.sync_bucket_mib."""
    optimizer_step: float
    """Temporaries of the optimizer (never together with activations)."""
    process: float
    engine: EngineShare
    fragmentation: float
    """Share of the trainer's memory that its allocator loses between blocks."""
    host: HostMemory
    """Of the machine's."""

    @property
    def exact(self) -> int:
        """Parameters, gradients and optimizer."""
        return self.static.parameters + self.static.gradients + self.static.optimizer

    @property
    def training(self) -> float:
        """What an update adds."""
        return max(self.activations + self.vision_activations + self.work, self.optimizer_step)

    @property
    def lost(self) -> float:
        """By the allocator, between blocks, during an update."""
        return self.fragmentation * (self.exact + self.training)

    @property
    def phases(self) -> dict[str, float]:
        """Phase of a step → the most that it takes of the device."""

        def taken(added: float, engine: float) -> float:
            return self.process + (1 + self.fragmentation) * (self.exact + added) + engine

        return {
            "update": taken(self.training, self.engine.update),
            "weight sync": taken(self.synchronization, self.engine.sync),
            "generate": taken(0.0, self.engine.generate),
        }

    @property
    def fullest_phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak(self) -> float:
        """Of the device."""
        return max(self.phases.values())

    def as_json(self) -> dict[str, Any]:
        """All numbers, with ``phases``, ``fullest_phase``, ``peak`` and ``lost``."""
        derived = {name: getattr(self, name) for name in ("phases", "fullest_phase", "peak", "lost")}
        return {**asdict(self), **derived, "host": self.host.as_json()}


def static_memory(config: Config, derived: Derived, numbers: ArchitectureNumbers, stage: int) -> Static:
    """Exact bytes of a rank of a stage."""
    replicas = derived.data_size * derived.context_size
    return _static_memory(config.parallel, config.optimizer, numbers, stage, replicas, bytes_of_number(config))


@lru_cache(maxsize=4096)
def _static_memory(
    parallel: ParallelConfig,
    optimizer: OptimizerSection,
    numbers: ArchitectureNumbers,
    stage: int,
    sharded_over: int,
    wide: int,
) -> Static:
    """Kept, as a search asks for the same again and again."""
    distributed, trained = optimizer.distributed, trained_parts(optimizer)
    parameters = gradients = optimized = 0
    for chunk in range(parallel.virtual_pipeline):
        of_chunk = chunk_parameters(numbers, parallel, stage, chunk)
        found: Sequence[Bucket] = buckets(
            [one for one in of_chunk if one.part in trained], sharded_over, distributed=distributed
        )
        size = buffer_size(found)
        frozen = sum(one.count for one in of_chunk if one.part not in trained)
        parameters += wide * ((size if distributed else count(of_chunk, trained)) + frozen)
        gradients += SINGLE * size
        optimized += largest_optimized(found, sharded_over, distributed=distributed)
    own = stage_parameters(numbers, parallel, stage)
    return Static(
        num_parameters=count(own),
        num_trained=count(own, trained),
        num_joined=sum(one.count for one in own if one.part in trained and ".mlp.linear_fc1." in one.name),
        parameters=parameters,
        gradients=gradients,
        optimizer=optimized * (2 * SINGLE + (0 if wide == SINGLE else SINGLE)),
    )


def in_flight(derived: Derived, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, in whole stages (megatron-core's schedules.py).

    1F1B: stages behind it and itself. Interleaved: model chunks of 2 · (stages behind it) + (V - 1) · stages micro-
    batches come before the first backward pass, one more with it.
    """
    behind, chunks = derived.pipeline_size - stage - 1, derived.virtual_pipeline_size
    if chunks == 1:
        return min(behind + 1, micro_batches)
    warm_up = 2 * behind + (chunks - 1) * derived.pipeline_size
    return min(warm_up + 1, micro_batches * chunks) / chunks


def images_in_flight(derived: Derived, micro_batches: int) -> int:
    """Micro-batches whose images the first stage holds at once.

    Interleaved: forward passes come in groups of P micro-batches, chunk after chunk, and P of the first chunk come
    again before the first of the first group has gone back through the last chunk. So two groups are held (the test
    follows megatron-core's own table).
    """
    groups = 1 if derived.virtual_pipeline_size == 1 else 2
    return min(groups * derived.pipeline_size, micro_batches)


def stage_memory(
    config: Config,
    derived: Derived,
    numbers: ArchitectureNumbers,
    stage: int,
    sizes: Sequence[MicroBatchSize],
    *,
    micro_batches: int,
    modules: Modules,
    process: float,
    host_process: float,
    engine: EngineShare,
    fragmentation: float,
) -> StageMemory:
    """The memory of a rank of ``stage`` with the worst of some micro-batches, all in flight of that size."""
    static = static_memory(config, derived, numbers, stage)
    flying = in_flight(derived, stage, micro_batches)
    layers = derived.stage_layers[stage]
    is_first, is_last = stage == 0, stage == derived.pipeline_size - 1
    of_images = images_in_flight(derived, micro_batches) if is_first else 0

    def kept(one: Activations) -> tuple[float, float, float]:
        # A micro-batch goes back as soon as it has left the last chunk: one head is held.
        held = flying * layers * one.layer + (one.head if is_last else 0)
        return (
            held,
            of_images * one.vision,
            max(one.layer_work, one.loss_work if is_last else 0, one.vision_work if is_first else 0),
        )

    most = max((kept(activations(config, numbers, size, modules)) for size in sizes), key=sum)
    step = 0
    if modules == "torch":  # torch's AdamW goes parameter by parameter; the fused ones need nothing
        trained = [one.count for one in stage_parameters(numbers, config.parallel, stage)]
        step = 2 * SINGLE * max(trained) if trained else 0
    wide = bytes_of_number(config)
    smallest, whole = 2 * wide * numbers.vocabulary_size * numbers.hidden_size, wide * total_count(numbers)
    least_sync = 2 * min(smallest, whole)
    sync = 2 * min(max(config.rollout.sync_bucket_mib << 20, smallest), whole)
    return StageMemory(
        stage=stage,
        static=static,
        micro_batches_in_flight=flying,
        images_in_flight=of_images,
        activations=most[0],
        vision_activations=most[1],
        work=most[2],
        synchronization=sync,
        least_synchronization=least_sync,
        optimizer_step=step,
        process=process,
        engine=engine,
        fragmentation=fragmentation,
        host=host_memory(
            num_parameters=static.num_parameters,
            num_trained=static.num_trained,
            num_joined=static.num_joined,
            wide=wide,
            replicas=derived.data_size * derived.context_size,
            distributed=config.optimizer.distributed,
            has_reference=config.algorithm.kl_coefficient > 0,
            process=host_process,
            engine=engine.host,
        ),
    )


def plan_memory(
    config: Config,
    derived: Derived,
    numbers: ArchitectureNumbers,
    workload: Workload,
    gpu: Gpu,
    assumptions: Assumptions,
    *,
    engine: EngineShare,
) -> list[StageMemory]:
    """Of each stage on a device; ``engine`` is each rank's."""
    gib = assumptions.cpu_process_gib + assumptions.cpu_workspace_gib if gpu.is_cpu else assumptions.device_gib
    return [
        stage_memory(
            config,
            derived,
            numbers,
            stage,
            (workload.with_images, workload.text_only),
            micro_batches=workload.most_micro_batches,
            modules=modules_on(gpu, config),
            process=GIB * gib,
            host_process=0.0 if gpu.is_cpu else GIB * assumptions.host_process_gib,
            engine=engine,
            fragmentation=0.0 if gpu.is_cpu else assumptions.fragmentation,
        )
        for stage in range(derived.pipeline_size)
    ]


def modules_on(gpu: Gpu, config: Config) -> Modules:
    """Transformer Engine's on a GPU in bfloat16 (where it has to be installed), else torch's."""
    return "torch" if gpu.is_cpu or config.model.dtype == "float32" else "transformer_engine"
