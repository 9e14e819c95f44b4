"""What a plan says of the machine's memory, and that it refuses what does not fit there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from derive_case import TINY, config_of

from perl_megatron.config.derive import derive
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.device_plan import Device, DevicePlan, make_device_plan
from perl_megatron.plan.gpus import GIB, gpu_of
from perl_megatron.plan.parameters import total_count

VLLM = ("rollout.engine=vllm", "rollout.gpu_memory_fraction=0.25", "data.max_prompt_tokens=64")
NUMBERS = total_count(TINY)
JOINED = 2 * TINY.ffn_size * TINY.hidden_size * TINY.num_layers
JOINED += 2 * TINY.vision_ffn_size * (TINY.vision_hidden_size + 1) * TINY.vision_depth  # with its bias


def plan_of(*settings: str, world_size: int = 1, gpu: str = "h100-80g", **how: Any) -> DevicePlan:
    config = config_of(*settings)
    derived = derive(config, world_size=world_size, architecture=TINY, elsewhere=True)
    assumptions = replace(Assumptions(), **how)
    return make_device_plan(config, derived, TINY, Device.of(gpu_of(gpu), assumptions, processes=world_size))


@pytest.mark.parametrize(
    ("settings", "replicas", "copied", "states"),
    [
        (("model.dtype=bfloat16",), 1, 2 * 12 + 2, 12),
        (("model.dtype=bfloat16",), 4, 2 * 12 + 2, 12),
        (("model.dtype=float32",), 2, 2 * 12 + 4, 12),
        (("model.dtype=bfloat16", "optimizer.distributed=false"), 2, 12 + 2, 12),
        (("model.dtype=float32", "optimizer.distributed=false"), 2, 8 + 4, 8),
    ],
)
def test_bytes_a_number(settings: tuple[str, ...], replicas: int, copied: int, states: int) -> None:
    (stage,) = plan_of(*VLLM, *settings, world_size=replicas).stages
    wide = 4 if "model.dtype=float32" in settings else 2
    assert stage.host.checkpoint == NUMBERS * copied / replicas
    assert stage.host.resume == (NUMBERS + JOINED) * states
    assert stage.host.reference == stage.host.engine == NUMBERS * wide
    most = max(stage.host.engine + stage.host.checkpoint, stage.host.resume)
    assert stage.host.peak == stage.host.process + stage.host.reference + most
    assert stage.as_json()["host"]["peak"] == stage.host.peak


def test_without_reference_and_with_an_engine_elsewhere() -> None:
    settings = ("rollout.engine=server", "rollout.servers=http://a:1", "algorithm.kl_coefficient=0")
    (stage,) = plan_of(*settings).stages
    assert stage.host.reference == stage.host.engine == 0


def test_a_machine_with_too_little_is_refused() -> None:
    need = plan_of(*VLLM).stages[0].host.peak / GIB
    fits, lacks = (plan_of(*VLLM, host_gib=gib) for gib in (need + 1e-5, need - 1e-5))
    assert not fits.obstacles
    (obstacle,) = lacks.obstacles
    assert obstacle.name == "host memory"
    assert obstacle.text.startswith(f"rank 0 (pipeline stage 0) needs {need:.1f} GiB of the machine's memory")
    for way in ("more processes", "algorithm.kl_coefficient=0", "rollout.sleep_mode=false", "--assume host_gib"):
        assert way in obstacle.fix


def test_on_a_cpu_it_is_the_devices_memory() -> None:
    settings = ("rollout.engine=embedded", "data.max_prompt_tokens=64", "model.dtype=float32")
    plan = plan_of(*settings, gpu="cpu", host_gib=1e-3)
    (stage,) = plan.stages
    assert stage.host.process == 0
    assert not plan.obstacles
    config = config_of(*settings)
    derived = derive(config, world_size=1, architecture=TINY, elsewhere=True)
    for more, is_refused in ((1.01, False), (0.99, True)):
        gib = (stage.peak + more * stage.host.peak) / GIB
        device = Device.of(gpu_of("cpu"), Assumptions(), processes=1, memory_gib=gib)
        obstacles = make_device_plan(config, derived, TINY, device).obstacles
        assert [one.name for one in obstacles] == (["host memory"] if is_refused else [])
