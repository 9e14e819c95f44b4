"""A plan for a kind of device: memory of each stage, engine, step time, messages, remarks, assumptions. No torch."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.plan.advice import advise
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.engine import EngineMemory, engine_memory
from perl_megatron.plan.gpus import GIB, Gpu
from perl_megatron.plan.memory import StageMemory, modules_on, plan_memory
from perl_megatron.plan.memory_advice import MemoryAdvice
from perl_megatron.plan.node import Node
from perl_megatron.plan.remark import Remark, cannot_run
from perl_megatron.plan.step_time import Roofline, StepTime
from perl_megatron.plan.workload import Workload, make_workload


@dataclass(frozen=True)
class Device:
    """What a process runs on, and what is taken for granted about it."""

    gpu: Gpu
    """With as many devices in a node as the run has."""
    memory: float
    """Bytes that each process can have."""
    assumptions: Assumptions
    node_source: str = ""
    """What says how many devices a node has; '': the data sheet's."""

    @property
    def host_memory(self) -> float:
        """Bytes of its machine's memory that each process can have."""
        return self.memory if self.gpu.is_cpu else self.assumptions.host_gib * GIB

    @classmethod
    def of(
        cls,
        gpu: Gpu,
        assumptions: Assumptions,
        *,
        processes: int,
        memory_gib: float | None = None,
        node: Node | None = None,
    ) -> Device:
        """Of a run of so many processes, on machines like ``node``.

        ``memory_gib``: what processes can have of it, in place of the data sheet's without the driver's part, or, on a
        CPU, of an equal share of this machine's memory.
        """
        if node is not None:
            gpu = replace(gpu, per_node=node.size)
        if memory_gib is not None:
            memory = memory_gib * GIB
        elif gpu.memory is not None:
            memory = gpu.memory - assumptions.device_reserve_gib * GIB
        else:
            here = processes if node is None else min(processes, node.size)
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / here
        if memory <= 0:
            raise UserError(
                "nothing of a device is left for processes",
                where=f"--assume device_reserve_gib={assumptions.device_reserve_gib:g}",
                fix="make it smaller, or give --memory-gib",
            )
        return cls(gpu, memory, assumptions, "" if node is None else node.source)


@dataclass(frozen=True)
class MemoryPlan:
    """What each rank's memory is taken by."""

    workload: Workload
    engine: EngineMemory
    stages: tuple[StageMemory, ...]

    @property
    def fullest(self) -> float:
        """Bytes of the rank that needs most."""
        return max(stage.peak for stage in self.stages)


@dataclass(frozen=True)
class DevicePlan(MemoryPlan):
    """What a config comes to on a kind of device."""

    device: Device
    modules: str
    time: StepTime
    remarks: tuple[Remark, ...]

    @property
    def obstacles(self) -> list[Remark]:
        """Why it cannot run; empty where it can."""
        return cannot_run(self.remarks)

    def as_json(self) -> dict[str, Any]:
        """All numbers: bytes, seconds, shares."""
        return {
            "device": {
                **asdict(self.device.gpu),
                "memory": self.device.memory,
                "per_node_source": self.device.node_source,
            },
            "modules": self.modules,
            "workload": asdict(self.workload),
            "memory": [stage.as_json() for stage in self.stages],
            "engine": self.engine.as_json(),
            "step": self.time.as_json(),
            "remarks": [remark.as_json() for remark in self.remarks],
            "assumptions": self.device.assumptions.explain(),
            "fits": not self.obstacles,
        }


def make_memory_plan(config: Config, derived: Derived, numbers: ArchitectureNumbers, device: Device) -> MemoryPlan:
    """The memory of a config that ``derive`` has accepted, which is found much sooner than its times."""
    workload = make_workload(config, derived, numbers, device.assumptions)
    engine = engine_memory(
        config,
        derived,
        numbers,
        device.gpu,
        device.assumptions,
        device_bytes=device.memory,
        prompt_tokens=workload.prompt_tokens,
        response_tokens=workload.response_tokens,
    )
    stages = plan_memory(config, derived, numbers, workload, device.gpu, device.assumptions, engine=engine.share)
    return MemoryPlan(workload, engine, tuple(stages))


def make_device_plan(config: Config, derived: Derived, numbers: ArchitectureNumbers, device: Device) -> DevicePlan:
    """The plan of a config that ``derive`` has accepted."""
    gpu, assumptions = device.gpu, device.assumptions
    memory = make_memory_plan(config, derived, numbers, device)
    workload, engine, stages = memory.workload, memory.engine, memory.stages
    lighter = config.model_copy(update={"model": config.model.model_copy(update={"recompute": "selective"})})
    without = plan_memory(lighter, derived, numbers, workload, gpu, assumptions, engine=engine.share)
    time = Roofline(config, derived, numbers, workload, gpu, assumptions).step(engine)
    return DevicePlan(
        device=device,
        workload=workload,
        modules=modules_on(gpu, config),
        stages=stages,
        engine=engine,
        time=time,
        remarks=tuple(
            advise(
                MemoryAdvice(
                    config, derived, numbers, gpu, device.memory, stages, workload, engine, device.host_memory
                ),
                time,
                without_full_recomputation=max(stage.peak for stage in without),
            )
        ),
    )
