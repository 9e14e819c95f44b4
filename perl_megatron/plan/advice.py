"""Named remarks on a plan: what cannot run, what wastes, and which ranks could be left without images. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.plan.engine import EngineMemory
from perl_megatron.plan.gpus import GIB, Gpu
from perl_megatron.plan.memory import StageMemory
from perl_megatron.plan.step_time import StepTime
from perl_megatron.plan.workload import Workload

FULL = 0.9
"""Share of a device above which a plan is called tight."""


@dataclass(frozen=True)
class Remark:
    """Something to know about a plan."""

    name: str
    level: Literal["cannot run", "wasteful", "note"]
    text: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """As in the class."""
        return asdict(self)


def advise(
    config: Config,
    derived: Derived,
    gpu: Gpu,
    device_bytes: float,
    stages: Sequence[StageMemory],
    engine: EngineMemory,
    time: StepTime,
    workload: Workload,
    *,
    without_full_recomputation: float,
) -> list[Remark]:
    """All remarks, what cannot run first. ``without_full_recomputation``: the peak with `model.recompute=selective`."""
    remarks = [
        *_memory(config, derived, device_bytes, stages, workload, without_full_recomputation),
        *_engine(config, derived, engine),
        *_micro_batches(config, workload, time),
        *_layout(config, derived, gpu, stages, time),
        *_images(config, derived),
    ]
    return sorted(remarks, key=lambda remark: ("cannot run", "wasteful", "note").index(remark.level))


def cannot_run(remarks: Sequence[Remark]) -> list[Remark]:
    """Those that say so."""
    return [remark for remark in remarks if remark.level == "cannot run"]


def _memory(
    config: Config,
    derived: Derived,
    device_bytes: float,
    stages: Sequence[StageMemory],
    workload: Workload,
    without_full_recomputation: float,
) -> Iterator[Remark]:
    worst = max(stages, key=lambda stage: stage.peak)
    ranks = derived.world_size // derived.pipeline_size
    where = f"ranks {worst.stage * ranks} to {(worst.stage + 1) * ranks - 1} (pipeline stage {worst.stage})"
    phase = worst.fullest_phase
    if worst.peak > device_bytes:
        text = f"{where} need {worst.peak / GIB:.1f} GiB ({phase}), and a device has {device_bytes / GIB:.1f} GiB"
        yield Remark("does not fit", "cannot run", text, "; ".join(_ways_to_less(config, derived, workload, worst)))
    elif worst.peak > FULL * device_bytes:
        share = worst.peak / device_bytes
        yield Remark(
            "tight",
            "note",
            f"{where} need {share:.0%} of a device ({phase}): the assumptions below decide whether it fits",
            "; ".join(_ways_to_less(config, derived, workload, worst)[:2]),
        )
    elif config.model.recompute == "full" and without_full_recomputation < FULL * device_bytes:
        yield Remark(
            "recomputes with memory left",
            "wasteful",
            "a third more arithmetic in the language model's updates, while with selective recomputation "
            f"{without_full_recomputation / device_bytes:.0%} of the fullest device would be taken",
            "model.recompute=selective",
        )


def _ways_to_less(config: Config, derived: Derived, workload: Workload, worst: StageMemory) -> list[str]:
    """What to change in the fullest phase, by what takes most."""
    ways = [(float(worst.exact), "a larger parallel.tensor or parallel.pipeline, or more processes")]
    if not config.optimizer.distributed and derived.data_size > 1:
        ways.append((worst.static.optimizer, "optimizer.distributed=true"))
    phase = worst.fullest_phase
    if phase == "update":
        active = worst.activations + worst.vision_activations + worst.work
        if config.model.recompute != "full":
            ways.append((active, "model.recompute=full"))
        elif config.actor.micro_batch_tokens > derived.max_sequence_tokens:
            # Below the largest view's memory, views are split and computed more than once.
            whole = workload.largest_view_memory
            least = whole if config.actor.micro_batch_tokens > whole else max(derived.max_sequence_tokens, 1)
            ways.append((active, f"actor.micro_batch_tokens={least}"))
        else:
            ways.append((active, "shorter data.max_prompt_tokens or rollout.max_response_tokens"))
        if not config.parallel.sequence and derived.tensor_size > 1:
            ways.append((active / 2, "parallel.sequence=true"))
    elif phase == "weight sync" and worst.synchronization > worst.least_synchronization:
        ways.append((worst.synchronization, "a smaller rollout.sync_bucket_mib"))
    own = {"update": worst.engine.update, "weight sync": worst.engine.sync, "generate": worst.engine.generate}[phase]
    if own and not worst.engine.sleeps and not config.rollout.sleep_mode:
        ways.append((own, "rollout.sleep_mode=true"))
    if own == worst.engine.generate > 0 and derived.engine == "vllm":
        ways.append((own, f"rollout.gpu_memory_fraction below {config.rollout.gpu_memory_fraction:g}"))
    if own and derived.engine == "embedded":
        ways.append((own, "rollout.engine=vllm, which is spread over processes"))
    return [text for _, text in sorted(ways, reverse=True)]


def _engine(config: Config, derived: Derived, engine: EngineMemory) -> Iterator[Remark]:
    rollout = config.rollout
    if derived.engine == "embedded":
        if derived.world_size > 1 or _is_large(engine):
            yield Remark(
                "slow engine",
                "wasteful",
                "the embedded engine is a whole model in every process, and made for tests and small policies",
                "install vLLM and set rollout.engine=vllm, or ask servers",
            )
        return
    if engine.cache <= 0 or not engine.longest_fits:
        weights, rest = engine.weights / GIB, (engine.multimodal + engine.step + engine.fixed) / GIB
        yield Remark(
            "engine does not fit",
            "cannot run",
            f"of vLLM's {engine.reserve / GIB:.1f} GiB, weights take {weights:.1f} and one step with its images "
            f"{rest:.1f}: what is left holds no sequence of {derived.max_sequence_tokens} tokens",
            "a larger rollout.gpu_memory_fraction or rollout.tensor_parallel, or fewer data.max_prompt_tokens",
        )
    elif engine.concurrent_sequences < rollout.max_concurrent_sequences:
        yield Remark(
            "engine runs few sequences",
            "wasteful",
            f"vLLM's cache holds about {engine.concurrent_sequences} sequences of mean length, not the "
            f"{rollout.max_concurrent_sequences} of rollout.max_concurrent_sequences",
            "a larger rollout.gpu_memory_fraction or rollout.tensor_parallel",
        )
    if derived.engine == "vllm" and not rollout.sleep_mode:
        yield Remark(
            "engine stays awake",
            "note",
            f"vLLM keeps its {engine.reserve / GIB:.1f} GiB during updates",
            "rollout.sleep_mode=true copies its weights to host memory and back in every step",
        )


def _is_large(engine: EngineMemory) -> bool:
    """Whether the embedded engine's model is one that vLLM should run."""
    return engine.weights > GIB


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


def _layout(
    config: Config, derived: Derived, gpu: Gpu, stages: Sequence[StageMemory], time: StepTime
) -> Iterator[Remark]:
    parallel = config.parallel
    if derived.tensor_size > gpu.per_node:
        yield Remark(
            "tensor group leaves its node",
            "wasteful",
            f"{derived.tensor_size} tensor-parallel ranks do not fit into a node of {gpu.per_node}: each layer waits "
            "for the network",
            f"parallel.tensor={gpu.per_node} or less, and parallel.pipeline for the rest",
        )
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
            f"only ranks 0 to {ranks - 1} (pipeline stage 0) encode images; the other {derived.world_size - ranks} "
            "never see any",
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
