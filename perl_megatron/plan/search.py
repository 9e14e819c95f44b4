"""The best layouts for a number of devices: those that `derive` accepts and that fit, by the roofline. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived, derive
from perl_megatron.config.derive_launch import with_servers
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.plan.device_plan import Device, DevicePlan, MemoryPlan, make_device_plan, make_memory_plan
from perl_megatron.plan.gpus import Gpu
from perl_megatron.plan.node import launch_for

RECOMPUTE = ("none", "selective", "full")
LONGEST_SEQUENCES = (1, 2, 4, 8)
"""Micro-batches of so many of the longest sequences are tried, beside those of the config."""
MAX_VIRTUAL = 4
FULLEST, FRACTION_STEP = 0.95, 0.05
"""No device is to be fuller than that; a colocated engine's share is chosen in such steps."""


@dataclass(frozen=True)
class Proposal:
    """A layout that fits."""

    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data: int
    recompute: str
    engine_tensor: int
    engine_fraction: float
    """Of a device, where the engine is colocated vLLM."""
    micro_batch_tokens: int
    seconds: float
    """Of a step."""
    memory_share: float
    """Of the fullest device."""
    overrides: tuple[str, ...]
    """What makes the config this one; to be pasted behind a command."""

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True)
class SearchResult:
    """What was tried, and the best."""

    tried: int
    """Layouts that `derive` accepted."""
    fitting: int
    proposals: tuple[Proposal, ...]


def search(
    config: Config, numbers: ArchitectureNumbers, device: Device, *, processes: int, limit: int, elsewhere: bool
) -> SearchResult:
    """The ``limit`` fastest layouts of ``processes``, of each trainer layout only the best of its other settings.

    ``elsewhere`` as in ``derive``. Equal times: the one with more memory left. The machines are as many as it takes,
    of the size of the device's nodes; those of `launch.rollout_nodes` are not among the ``processes``.

    Raises:
        UserError: there cannot be the servers that the config asks for.
    """
    launch = launch_for(config.launch, processes, device.gpu.per_node)
    per_node = processes // launch.nodes if launch.nodes > 1 else device.gpu.per_node
    device = replace(device, gpu=replace(device.gpu, per_node=per_node))
    start = with_servers(config.model_copy(update={"launch": launch}))
    tried, found = 0, []
    for candidate in _candidates(start, numbers, processes, device.gpu):
        try:
            derived = derive(candidate, world_size=processes, architecture=numbers, elsewhere=elsewhere)
        except UserError:
            continue
        tried += 1
        fitted = _fitted(candidate, derived, numbers, device)
        if fitted is not None:
            candidate, plan = fitted  # noqa: PLW2901
            found.append((plan.time.total, plan.fullest / device.memory, candidate, derived.data_size))
    found.sort(key=lambda one: one[:2])
    best: dict[tuple[int, ...], Proposal] = {}
    for seconds, share, candidate, data in found:
        proposal = _proposal(candidate, tuple(_overrides(config, start, candidate, data)), seconds, share, data)
        layout = (proposal.tensor, proposal.pipeline, proposal.virtual_pipeline, proposal.context)
        best.setdefault(layout, proposal)
    return SearchResult(tried, len(found), tuple(best.values())[:limit])


def _fitted(
    candidate: Config, derived: Derived, numbers: ArchitectureNumbers, device: Device
) -> tuple[Config, DevicePlan] | None:
    """The candidate with its plan, a colocated engine with a share that suits it; None where it does not fit."""
    memory = make_memory_plan(candidate, derived, numbers, device)
    if derived.engine == "vllm" and not device.gpu.is_cpu:
        fraction = _fraction(candidate, memory, device)
        if fraction <= 0:
            return None
        if fraction != candidate.rollout.gpu_memory_fraction:
            rollout = candidate.rollout.model_copy(update={"gpu_memory_fraction": fraction})
            candidate = candidate.model_copy(update={"rollout": rollout})
            memory = make_memory_plan(candidate, derived, numbers, device)
    if memory.fullest > FULLEST * device.memory:
        return None
    plan = make_device_plan(candidate, derived, numbers, device)
    return None if plan.obstacles else (candidate, plan)


def _fraction(candidate: Config, plan: MemoryPlan, device: Device) -> float:
    """What vLLM may take: as much as is free, or less where that is enough and no less than the config's."""
    engine, memory = plan.engine, device.memory
    without = max(
        stage.phases["generate"] - engine.reserve if engine.share.sleeps else stage.peak - engine.reserve
        for stage in plan.stages
    )
    free = math.floor((FULLEST - without / memory) / FRACTION_STEP) * FRACTION_STEP
    enough = math.ceil(engine.enough / memory / FRACTION_STEP) * FRACTION_STEP
    return round(min(free, max(enough, candidate.rollout.gpu_memory_fraction)), 2)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _candidates(config: Config, numbers: ArchitectureNumbers, processes: int, gpu: Gpu) -> Iterator[Config]:
    """Every config that could be tried; `derive` decides."""
    contexts = [1, 2, 4] if config.actor.sharing != "full" else [1]
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    budgets = sorted({config.actor.micro_batch_tokens, *(times * longest for times in LONGEST_SEQUENCES)})
    near = [size for size in _divisors(processes) if gpu.within_node(size, processes)]
    tensors = [size for size in near if numbers.num_kv_heads % size == 0]
    pipelines = [size for size in _divisors(processes) if size <= numbers.num_layers]
    engines: list[int | None] = [None]
    if config.rollout.engine != "server":
        engines = [size for size in tensors if numbers.num_heads % size == 0]
    for tensor, pipeline, context in product(tensors, pipelines, contexts):
        if processes % (tensor * pipeline * context):
            continue
        for virtual, first in product(_virtual(pipeline), _first_stages(numbers.num_layers, pipeline)):
            parallel = {
                "tensor": tensor,
                "pipeline": pipeline,
                "context": context,
                "virtual_pipeline": virtual,
                "first_stage_layers": first,
                "last_stage_layers": None,
                "sequence": tensor > 1,
                "data": None,
                "vision": _vision(config, numbers, tensor),
            }
            for recompute, budget, engine in product(RECOMPUTE, budgets, engines):
                changed: dict[str, dict[str, Any]] = {
                    "parallel": parallel,
                    "model": {"recompute": recompute},
                    "actor": {"micro_batch_tokens": budget},
                    "rollout": {} if engine is None else {"tensor_parallel": engine},
                }
                sections = {name: getattr(config, name).model_copy(update=values) for name, values in changed.items()}
                yield config.model_copy(update=sections)


def _virtual(pipeline: int) -> list[int]:
    return list(range(1, MAX_VIRTUAL + 1)) if pipeline > 1 else [1]


def _first_stages(layers: int, pipeline: int) -> list[int | None]:
    """As many as the others, or the most below that leave the others equally many: it runs the vision tower too."""
    if pipeline == 1:
        return [None]
    fewer = [first for first in range(1, layers // pipeline) if (layers - first) % (pipeline - 1) == 0]
    return [None, *fewer[-1:]]


def _vision(config: Config, numbers: ArchitectureNumbers, tensor: int) -> str:
    """Sharded only where it divides."""
    divides = numbers.vision_num_heads % tensor == 0 and numbers.vision_ffn_size % tensor == 0
    return config.parallel.vision if divides else "replicated"


def _proposal(candidate: Config, overrides: tuple[str, ...], seconds: float, share: float, data: int) -> Proposal:
    parallel = candidate.parallel
    return Proposal(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        data=data,
        recompute=candidate.model.recompute,
        engine_tensor=candidate.rollout.tensor_parallel or 1,
        engine_fraction=candidate.rollout.gpu_memory_fraction,
        micro_batch_tokens=candidate.actor.micro_batch_tokens,
        seconds=seconds,
        memory_share=share,
        overrides=overrides,
    )


def _overrides(config: Config, start: Config, candidate: Config, data: int) -> Iterator[str]:
    """The settings that differ, and always the data-parallel size, so that the command starts as many processes.

    ``start``: the config on its machines, where the candidates come from.
    """
    yield f"parallel.data={data}"
    for section in ("launch", "parallel", "model", "actor", "rollout"):
        before = getattr(config if section == "launch" else start, section)
        after = getattr(candidate, section)
        for name in type(after).model_fields:
            old, new = getattr(before, name), getattr(after, name)
            if old != new and (section, name) != ("parallel", "data"):
                yield f"{section}.{name}={'null' if new is None else str(new).lower()}"
