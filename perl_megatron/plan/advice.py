"""Named remarks on a plan: what cannot run, what wastes, and which ranks could be left without images. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.plan.engine import EngineMemory
from perl_megatron.plan.gpus import GIB, Gpu
from perl_megatron.plan.memory import StageMemory
from perl_megatron.plan.memory_advice import MemoryAdvice
from perl_megatron.plan.remark import Remark, name_ranks
from perl_megatron.plan.step_time import StepTime
from perl_megatron.plan.workload import Workload


def advise(memory: MemoryAdvice, time: StepTime, *, without_full_recomputation: float) -> list[Remark]:
    """All remarks, what cannot run first.

    ``without_full_recomputation``: the peak in bytes with `model.recompute=selective`.
    """
    config, derived = memory.config, memory.derived
    remarks = [
        *memory.on_training(without_full_recomputation=without_full_recomputation),
        *memory.on_host(),
        *memory.on_engine(),
        *_micro_batches(config, memory.workload, time),
        *_nodes(derived, memory.gpu, memory.engine),
        *_layout(config, derived, memory.stages, time),
        *_images(config, derived),
    ]
    return sorted(remarks, key=lambda remark: ("cannot run", "wasteful", "note").index(remark.level))


def _micro_batches(config: Config, workload: Workload, time: StepTime) -> Iterator[Remark]:
    """What mean groups have computed again because they are divided over micro-batches."""
    sharing = config.actor.sharing
    if sharing == "full" and time.view_parts > 1:
        memory = "a larger parallel.tensor or parallel.pipeline"
        if config.model.recompute != "full":
            memory = f"model.recompute=full, or {memory}"
        yield Remark(
            "views are split",
            "wasteful",
            f"a mean view takes {workload.view_memory} of actor.micro_batch_tokens = "
            f"{config.actor.micro_batch_tokens}: its responses are divided over {time.view_parts:.3g} micro-batches, "
            f"each of which computes its prompt and images; updates compute {time.computed_flops / 1e15:.1f} PFLOP "
            f"(recomputation included) for {time.update_flops / 1e15:.1f} of useful work",
            f"actor.micro_batch_tokens well above {workload.view_memory} ({workload.largest_view_memory} holds the "
            f"largest view whole); {memory} makes room for it",
        )
    elif sharing != "none" and time.image_runs > 1.05:
        yield Remark(
            "images encoded again",
            "note",
            f"an image is encoded {time.image_runs:.3g} times in an update, as what has it does not fit into one "
            "micro-batch",
            f"actor.micro_batch_tokens from {workload.group_memory} on holds a mean group whole, but a pipeline waits "
            "longer for fewer micro-batches",
        )


def _nodes(derived: Derived, gpu: Gpu, engine: EngineMemory) -> Iterator[Remark]:
    near = f"a divisor of the {gpu.per_node} processes of a node"
    if not gpu.within_node(derived.tensor_size, derived.world_size):
        yield Remark(
            "tensor group leaves its node",
            "wasteful",
            f"groups of {derived.tensor_size} tensor-parallel ranks do not fit into nodes of {gpu.per_node}: each "
            "layer waits for the network",
            f"a parallel.tensor that is {near}, and parallel.pipeline for the rest",
        )
    # Servers begin anew on each node.
    processes = engine.tensor_size if derived.engine == "server" else derived.world_size
    if not gpu.within_node(engine.tensor_size, processes):
        yield Remark(
            "engine leaves its node",
            "wasteful",
            f"engines over {engine.tensor_size} processes do not fit into nodes of {gpu.per_node}: each token waits "
            "for the network, which its time does not count",
            f"a rollout.tensor_parallel that is {near}",
        )


def _layout(config: Config, derived: Derived, stages: Sequence[StageMemory], time: StepTime) -> Iterator[Remark]:
    parallel = config.parallel
    if derived.tensor_size > 1 and not parallel.sequence:
        yield Remark(
            "no sequence parallelism",
            "wasteful",
            "every tensor-parallel rank keeps all norms' inputs and outputs",
            "parallel.sequence=true sends as much and keeps less",
        )
    if time.bubble > 0.2:
        yield Remark(
            "pipeline bubble",
            "wasteful",
            f"stages wait {time.bubble:.0%} of an update of {time.micro_batches} micro-batches",
            "parallel.virtual_pipeline above 1, a smaller actor.micro_batch_tokens that still holds a view, fewer "
            "stages, or fewer updates",
        )
    if not config.optimizer.distributed and derived.data_size * derived.context_size > 1:
        ranks = derived.data_size * derived.context_size
        spared = max(stage.static.optimizer for stage in stages) * (1 - 1 / ranks) / GIB
        yield Remark(
            "optimizer not sharded",
            "wasteful",
            f"all {ranks} replicas keep the whole optimizer state, of which {spared:.1f} GiB could be spared",
            "optimizer.distributed=true",
        )
    heaviest, lightest = max(derived.stage_layers), min(derived.stage_layers)
    if derived.pipeline_size > 1 and heaviest > 1.5 * lightest:
        yield Remark(
            "uneven stages",
            "wasteful",
            f"the stages have {lightest} to {heaviest} layers, and all wait for the slowest",
            "parallel.first_stage_layers and parallel.last_stage_layers closer to the others",
        )
    if time.reference_exchange > 0.2 * time.total:
        yield Remark(
            "reference weights travel",
            "wasteful",
            f"{time.reference_exchange:.0f} s of a step go into exchanging weights with the reference's in host memory",
            "algorithm.kl_coefficient=0, or more processes for a replica",
        )


def _images(config: Config, derived: Derived) -> Iterator[Remark]:
    ranks = derived.world_size // derived.pipeline_size
    if derived.pipeline_size > 1:
        yield Remark(
            "stages without images",
            "note",
            f"only {name_ranks(0, ranks)} (pipeline stage 0) {'encodes' if ranks == 1 else 'encode'} images; the other "
            f"{derived.world_size - ranks} never see any",
        )
    # Under full sharing a view goes to a single rank, and views of common images stay together where they fit.
    units = derived.questions_per_update * derived.views_per_question
    if config.actor.sharing != "full":
        units *= derived.rollouts_per_view
    if units < derived.data_size:
        yield Remark(
            "ranks without work",
            "wasteful",
            f"an update has {units} {'views' if config.actor.sharing == 'full' else 'sequences'} for "
            f"{derived.data_size} data-parallel ranks: {derived.data_size - units} of them get none, and no images",
            "more rollout.questions_per_step, fewer algorithm.updates_per_step, or more ranks for each replica",
        )
    elif derived.data_size > 1:
        yield Remark(
            "ranks that may lack images",
            "note",
            f"a data-parallel rank gets about {units / derived.data_size:.3g} of an update's {units} parts; where all "
            "of its questions are text, it encodes nothing and waits in the reduction of the tower's gradients",
        )
    if config.parallel.vision == "replicated" and derived.tensor_size > 1:
        yield Remark(
            "tensor ranks without images",
            "note",
            f"a micro-batch with fewer than {derived.tensor_size} distinct images leaves some tensor-parallel ranks "
            "without one: they wait for the others' features",
            "parallel.vision=sharded divides each image, where its heads divide",
        )
    if derived.context_size > 1:
        yield Remark(
            "context ranks without images",
            "note",
            f"a sequence is cut into {2 * derived.context_size} parts; a context rank whose two hold no image tokens "
            "encodes nothing, and one that holds a few encodes the whole image",
        )
