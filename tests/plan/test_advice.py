"""What is proposed against a lack of memory can help on that device, with that policy."""

from dataclasses import replace

import pytest
from derive_case import TINY, config_of

from perl_megatron.config.derive import derive
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.device_plan import Device, make_device_plan
from perl_megatron.plan.gpus import gpu_of

VLLM = ("rollout.engine=vllm", "rollout.cpu_cache_gib=2", "data.max_prompt_tokens=64")


def plan_of(*settings, world_size, gpu="h100-80g", numbers=TINY, memory_gib=0.01):
    config = config_of(*settings)
    derived = derive(config, world_size=world_size, architecture=numbers, elsewhere=True)
    device = Device.of(gpu_of(gpu), Assumptions(), processes=world_size, memory_gib=memory_gib)
    return make_device_plan(config, derived, numbers, device)


def lack(*settings, **how):
    """The remark on what does not fit."""
    (remark,) = [one for one in plan_of(*settings, **how).remarks if one.name == "does not fit"]
    return remark


@pytest.mark.parametrize(("gpu", "field"), [("cpu", "cpu_cache_gib below 2"), ("h100-80g", "gpu_memory_fraction")])
def test_an_engine_takes_less_by_the_field_of_its_device(gpu, field):
    memory = {"cpu": 1, "h100-80g": 40}[gpu]
    fix = lack(*VLLM, "rollout.gpu_memory_fraction=0.99", world_size=1, gpu=gpu, memory_gib=memory).fix
    other = {"cpu": "gpu_memory_fraction", "h100-80g": "cpu_cache_gib"}[gpu]
    assert f"rollout.{field}" in fix
    assert other not in fix


def test_nothing_sleeps_on_a_cpu():
    awake = (*VLLM, "rollout.sleep_mode=false")
    assert "rollout.sleep_mode=true" in lack(*awake, world_size=1).fix
    plan = plan_of(*awake, world_size=1, gpu="cpu")
    assert not [one for one in plan.remarks if "sleep_mode" in one.fix]


@pytest.mark.parametrize(("tensor", "wider"), [(1, True), (2, False)])
def test_a_cpus_engine_is_spread_as_far_as_its_heads_go(tensor, wider):
    fix = lack(*VLLM, f"rollout.tensor_parallel={tensor}", world_size=4, gpu="cpu").fix
    assert ("a larger rollout.tensor_parallel" in fix) == wider


@pytest.mark.parametrize(
    ("settings", "world_size", "ways"),
    [
        ((), 1, "a larger parallel.tensor or a larger parallel.pipeline or more processes"),
        (("parallel.tensor=2",), 2, "a larger parallel.pipeline or more processes"),  # as many as key-value heads
        (("parallel.pipeline=4",), 4, "a larger parallel.tensor or more processes"),  # as many as layers
        (("parallel.tensor=2", "parallel.pipeline=4", "optimizer.distributed=false"), 8, ""),
    ],
)
def test_a_policy_is_split_as_far_as_it_goes(settings, world_size, ways):
    fix = lack("rollout.engine=server", "rollout.servers=http://a:1", *settings, world_size=world_size).fix
    named = [part for part in fix.split("; ") if "parallel." in part.replace("parallel.sequence", "")]
    assert named == ([ways] if ways else [])


def test_a_machine_bounds_a_tensor_group():
    numbers = replace(TINY, num_heads=8, num_kv_heads=8)
    config = config_of("parallel.tensor=4")
    derived = derive(config, world_size=4, architecture=numbers, elsewhere=True)
    for per_node, is_named in ((8, True), (4, False)):
        gpu = replace(gpu_of("h100-80g"), per_node=per_node)
        plan = make_device_plan(config, derived, numbers, Device(gpu, 1.0, Assumptions()))
        (remark,) = [one for one in plan.remarks if one.name == "does not fit"]
        assert ("a larger parallel.tensor" in remark.fix) == is_named


def test_a_rank_alone_is_called_so():
    assert lack(world_size=1).text.startswith("rank 0 (pipeline stage 0) needs ")
    assert lack(world_size=2).text.startswith("ranks 0 to 1 (pipeline stage 0) need ")
    pipeline = plan_of("parallel.pipeline=2", world_size=2)
    (remark,) = [one for one in pipeline.remarks if one.name == "stages without images"]
    assert remark.text.startswith("only rank 0 (pipeline stage 0) encodes images; the other 1 never")
