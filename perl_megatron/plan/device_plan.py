"""A plan for a kind of device: memory of each stage, engine, step time, messages, remarks, assumptions. No torch."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.plan.advice import Remark, advise, cannot_run
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.engine import EngineMemory, engine_memory
from perl_megatron.plan.gpus import GIB, Gpu
from perl_megatron.plan.memory import StageMemory, modules_on, plan_memory
from perl_megatron.plan.step_time import Roofline, StepTime
from perl_megatron.plan.workload import Workload, make_workload


@dataclass(frozen=True)
class Device:
    """What a process runs on, and what is taken for granted about it."""

    gpu: Gpu
    memory: float
    """Bytes for each process."""
    assumptions: Assumptions

    @classmethod
    def of(cls, gpu: Gpu, assumptions: Assumptions, *, processes: int, memory_gib: float | None = None) -> Device:
        """``memory_gib``: in place of the data sheet's, or, on a CPU, of an equal share of this machine's memory."""
        memory = gpu.memory if memory_gib is None else memory_gib * GIB
        if memory is None:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
        return cls(gpu, memory, assumptions)


@dataclass(frozen=True)
class DevicePlan:
    """What a config comes to on a kind of device."""

    device: Device
    workload: Workload
    modules: str
    stages: tuple[StageMemory, ...]
    engine: EngineMemory
    time: StepTime
    remarks: tuple[Remark, ...]

    @property
    def obstacles(self) -> list[Remark]:
        """Why it cannot run; empty where it can."""
        return cannot_run(self.remarks)

    @property
    def fullest(self) -> float:
        """Bytes of the rank that needs most."""
        return max(stage.peak for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """All numbers: bytes, seconds, shares."""
        return {
            "device": {**asdict(self.device.gpu), "memory": self.device.memory},
            "modules": self.modules,
            "workload": asdict(self.workload),
            "memory": [stage.as_json() for stage in self.stages],
            "engine": self.engine.as_json(),
            "step": self.time.as_json(),
            "remarks": [remark.as_json() for remark in self.remarks],
            "assumptions": self.device.assumptions.explain(),
            "fits": not self.obstacles,
        }


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
                config,
                derived,
                gpu,
                device.memory,
                stages,
                engine,
                time,
                workload,
                without_full_recomputation=max(stage.peak for stage in without),
            )
        ),
    )
