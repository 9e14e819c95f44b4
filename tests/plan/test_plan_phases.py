"""What each phase of a step takes of a device, with an engine that sleeps and one that does not."""

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from derive_case import TINY, config_of

from perl_megatron.config.derive import derive
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.device_plan import Device, make_device_plan
from perl_megatron.plan.engine import EngineShare
from perl_megatron.plan.gpus import GIB, gpu_of
from perl_megatron.plan.parameters import total_count

VLLM = ("rollout.engine=vllm", "rollout.gpu_memory_fraction=0.25")
SHORT = ("data.max_prompt_tokens=64", "rollout.max_response_tokens=64", "actor.micro_batch_tokens=512")


def plan_of(*settings, world_size=1, gpu="h100-80g", numbers=TINY, **assumed):
    config = config_of(*SHORT, *settings)
    derived = derive(config, world_size=world_size, architecture=numbers, elsewhere=True)
    return make_device_plan(
        config, derived, numbers, Device.of(gpu_of(gpu), replace(Assumptions(), **assumed), processes=1)
    )


def test_a_sleeping_vllm_leaves_the_update_all_but_its_graphs():
    plan = plan_of(*VLLM)
    (stage,), weights = plan.stages, 2 * total_count(TINY)
    kept = Assumptions().engine_fixed_gib * GIB
    assert stage.engine == EngineShare(0.25 * plan.device.memory, sync=weights + kept, update=kept, host=weights)
    with_lost = 1 + Assumptions().fragmentation
    assert stage.phases == pytest.approx(
        {
            "update": stage.process + with_lost * (stage.exact + stage.training) + kept,
            "weight sync": stage.process + with_lost * (stage.exact + stage.synchronization) + weights + kept,
            "generate": stage.process + with_lost * stage.exact + 0.25 * plan.device.memory,
        }
    )
    assert stage.peak == stage.phases["generate"] == max(stage.phases.values())
    assert plan.time.sleep == pytest.approx(2 * weights / 25e9)


def test_one_that_stays_awake_has_its_reserve_in_all_phases():
    plan, asleep = plan_of(*VLLM, "rollout.sleep_mode=false"), plan_of(*VLLM)
    (stage,), reserve = plan.stages, 0.25 * plan.device.memory
    assert stage.engine == EngineShare(reserve, reserve, reserve)
    assert stage.phases["generate"] == asleep.stages[0].phases["generate"]
    more = {name: stage.phases[name] - asleep.stages[0].phases[name] for name in ("update", "weight sync")}
    assert more == pytest.approx({name: reserve - getattr(asleep.stages[0].engine, name.split()[-1]) for name in more})
    assert plan.time.sleep == 0


def test_on_a_cpu_nothing_is_given_back():
    for engine in ("vllm", "embedded"):
        (stage,) = plan_of(f"rollout.engine={engine}", gpu="cpu").stages
        assert stage.engine.update == stage.engine.sync == stage.engine.generate > 0
    plan = plan_of("rollout.engine=embedded")
    (stage,) = plan.stages
    assert plan.time.sleep == pytest.approx(2 * stage.engine.host / 10e9)  # host memory that is not pinned
    assert stage.engine.update == 0 < stage.engine.sync < stage.engine.generate


@pytest.mark.parametrize(
    ("settings", "phase", "way"),
    [
        ((*VLLM,), "generate", "rollout.gpu_memory_fraction below 0.25"),
        ((*VLLM, "rollout.sleep_mode=false"), "update", "rollout.sleep_mode=true"),
        (("rollout.engine=server", "rollout.servers=http://a:1"), "update", "model.recompute=full"),
        ((*VLLM, "rollout.gpu_memory_fraction=0.04", "rollout.sync_bucket_mib=65536"), "weight sync",
         "a smaller rollout.sync_bucket_mib"),
    ],
)  # fmt: skip
def test_what_is_to_be_changed_depends_on_the_phase(settings, phase, way):
    large = replace(TINY, num_layers=36, hidden_size=2048, ffn_size=11008, num_heads=16, head_dim=128,
                    vocabulary_size=151936)  # fmt: skip
    update = () if phase != "update" else ("model.recompute=none", "actor.micro_batch_tokens=400000")
    plan = plan_of(*settings, *update, numbers=large)
    assert plan.stages[0].fullest_phase == phase
    small = replace(plan.device, memory=0.9 * plan.stages[0].peak)
    config = config_of(*SHORT, *settings, *update)
    derived = derive(config, world_size=1, architecture=large, elsewhere=True)
    (remark,) = [one for one in make_device_plan(config, derived, large, small).remarks if one.name == "does not fit"]
    assert f"({phase})" in remark.text
    assert way in remark.fix


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_more_ranks_than_heads_hold_copies_of_keys_and_values(ranks, heads):
    servers = ("rollout.engine=server", "rollout.servers=http://a:1", f"rollout.tensor_parallel={ranks}")
    plan = plan_of(*servers, numbers=replace(TINY, num_heads=8, num_kv_heads=4))
    assert plan.engine.cache_per_token == 2 * TINY.num_layers * heads * TINY.head_dim * 2


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_upstream_is_as_the_plan_takes_it_to_be():
    folder = Path(find_spec("vllm").submodule_search_locations[0])
    config = (folder / "config" / "model.py").read_text()
    assert "return max(1, total_num_kv_heads // parallel_config.tensor_parallel_size)" in config
    assert "sleep_mode_offload_cudagraph: bool = False" in config
    backend = (folder / "device_allocator" / "sleep_mode_backend.py").read_text()
    assert re.search(r'offload_tags = \("weights", \*offload_tags\)', backend)


def test_enough_is_the_reserve_that_runs_all_sequences():
    settings = (*VLLM[:1], "rollout.max_concurrent_sequences=512", "rollout.max_response_tokens=2048")
    first = plan_of(*settings, "rollout.gpu_memory_fraction=0.5")
    share = first.engine.enough / first.device.memory
    at, below = (
        plan_of(*settings, f"rollout.gpu_memory_fraction={fraction}").engine.concurrent_sequences
        for fraction in (share + 1e-6, share - 1e-3)
    )
    assert at == 512 > below
