"""`perl-megatron plan --gpu`: what fits, what does not, what is remarked, and what everything rests on."""

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from perl_megatron.cli import main
from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import derive
from perl_megatron.config.load import load_config
from perl_megatron.errors import UserError
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.device_plan import Device, make_device_plan
from perl_megatron.plan.engine import EngineShare
from perl_megatron.plan.gpus import GIB, GPUS, gpu_of
from perl_megatron.plan.memory import images_in_flight, in_flight
from perl_megatron.plan.search import search

EXAMPLES = Path(__file__).parents[2] / "examples" / "qwen2_5_vl"


def arguments(size, *settings):
    return ["plan", str(EXAMPLES / f"{size}.yaml"), f"model.path={EXAMPLES / size.split('_')[0]}", *settings]


def device(processes=8, gpu="h100-80g", **assumed):
    return Device.of(gpu_of(gpu), replace(Assumptions(), **assumed), processes=processes)


def planned(size, *settings, world_size=8, on=None):
    config = load_config(EXAMPLES / f"{size}.yaml", [f"model.path={EXAMPLES / size}", *settings]).config
    numbers = read_architecture_numbers(EXAMPLES / size)
    derived = derive(config, world_size=world_size, architecture=numbers, elsewhere=True)
    return make_device_plan(config, derived, numbers, on or device())


def names(plan):
    return {remark.name for remark in plan.remarks}


def test_what_does_not_fit_ends_with_a_status_and_says_where_and_what_to_change(capsys):
    assert main([*arguments("7b", "rollout.gpu_memory_fraction=0.8"), "--gpu", "h100-80g"]) == 1
    output = capsys.readouterr()
    assert "pipeline stage 0" in output.err
    assert "rollout.gpu_memory_fraction below 0.8" in output.err
    assert "Memory of a rank" in output.out
    assert max(map(len, output.out.splitlines())) <= 110


@pytest.mark.parametrize(("budget", "said"), [(40960, 33848), (20480, 10240)])
def test_less_memory_is_first_sought_where_no_view_is_split(budget, said):
    small = Device(gpu_of("h100-80g"), 30 * GIB, Assumptions())
    settings = (f"actor.micro_batch_tokens={budget}", "rollout.engine=server", "rollout.servers=http://a:1")
    plan = planned("7b", *settings, on=small)
    (obstacle,) = [remark for remark in plan.obstacles if remark.name == "does not fit"]
    assert plan.workload.largest_view_memory == 33848
    assert f"actor.micro_batch_tokens={said}" in obstacle.fix


def test_json_has_everything_with_every_assumption(capsys):
    assert main([*arguments("32b"), "--gpu", "h200", "--json", "--assume", "matmul_efficiency=0.3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["memory"]) == 2
    reserve = Assumptions().device_reserve_gib * GIB
    assert found["device"]["memory"] == GPUS["h200"].memory - reserve
    assumed = {row["name"]: row["value"] for row in found["assumptions"]}
    assert assumed["matmul_efficiency"] == 0.3
    assert set(assumed) == set(Assumptions().__dict__)
    assert {row["name"] for row in found["step"]["traffic"]} >= {"tensor", "pipeline", "data", "weight sync"}
    assert found["ranks"][-1]["pipeline"] == 1


def test_without_a_device_nothing_is_assumed(capsys):
    settings = ("rollout.engine=embedded", "--json")
    assert main(arguments("3b", *settings)) == 0
    assert "assumptions" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [
        ["--gpu", "h300"],
        ["--search"],
        ["--assume", "matmul_efficiency=0.5"],
        ["--gpu", "cpu", "--assume", "efficiency=0.5"],
        ["--gpu", "cpu", "--assume", "matmul_efficiency=1.5"],
        ["--gpu", "cpu", "--assume", "device_gib=much"],
        ["--gpu", "cpu", "--memory-gib", "0"],
        ["--gpu", "cpu", "--memory-gib", "nan"],
        ["--gpu", "cpu", "--memory-gib", "inf"],
        ["--gpu", "cpu", "--memory-gib", "1e308"],
        ["--gpu", "h100-80g", "--assume", "device_gib=nan"],
        ["--gpu", "h100-80g", "--assume", "device_gib=inf"],
        *(
            ["--gpu", "h100-80g", "--assume", f"{name}={value}"]
            for name in ("pinned_copy_gb", "host_copy_gb", "disk_gb", "network_efficiency", "kept_share")
            for value in ("0", "1e-320")
        ),
        ["--gpu", "h100-80g", "--assume", "device_reserve_gib=79.6"],
        ["--gpus", "0"],
    ],
)
def test_options_that_mean_nothing_are_refused(capsys, options):
    assert main([*arguments("3b", "rollout.engine=embedded"), *options]) == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "world_size", "name"),
    [
        (["parallel.sequence=false"], 8, "no sequence parallelism"),
        (["optimizer.distributed=false"], 8, "optimizer not sharded"),
        (["rollout.gpu_memory_fraction=0.07"], 8, "engine does not fit"),
        (["rollout.gpu_memory_fraction=0.28", "rollout.tensor_parallel=1"], 8, "engine runs few sequences"),
        (["parallel.pipeline=4", "parallel.tensor=1", "parallel.sequence=false", "parallel.data=null",
          "actor.micro_batch_tokens=400000"], 8, "pipeline bubble"),
        (["parallel.tensor=2", "parallel.data=null", "rollout.questions_per_step=4", "algorithm.updates_per_step=1"],
         32, "ranks without work"),
        (["parallel.vision=replicated"], 8, "tensor ranks without images"),
        (["parallel.pipeline=2", "parallel.data=1"], 8, "stages without images"),
        (["parallel.pipeline=2", "parallel.data=1", "parallel.first_stage_layers=8"], 8, "uneven stages"),
        (["parallel.context=2", "parallel.data=1", "actor.sharing=vision"], 8, "context ranks without images"),
        (["rollout.engine=embedded"], 8, "slow engine"),
        (["rollout.sleep_mode=false"], 8, "engine stays awake"),
        (["rollout.gpu_memory_fraction=0.2", "data.max_prompt_tokens=512", "rollout.max_response_tokens=512",
          "actor.micro_batch_tokens=2048"], 8, "recomputes with memory left"),
        (["actor.micro_batch_tokens=16200"], 8, "views are split"),
        (["actor.micro_batch_tokens=20480"], 8, "images encoded again"),
    ],
)  # fmt: skip
def test_every_remark_has_its_occasion(settings, world_size, name):
    assert name in names(planned("7b", *settings, world_size=world_size, on=device(world_size)))
    assert name not in names(planned("7b"))


def test_tensor_groups_that_leave_a_node_are_remarked():
    narrow = Device(replace(gpu_of("h100-80g"), per_node=2), 80 * GIB, Assumptions())
    assert "tensor group leaves its node" in names(planned("7b", on=narrow))


def test_more_in_flight_needs_more_and_recomputation_less():
    peaks = [
        max(stage.peak for stage in planned("7b", f"model.recompute={recompute}").stages)
        for recompute in ("full", "selective", "none")
    ]
    assert peaks[0] < peaks[1] < peaks[2]
    stages = planned(
        "7b", "parallel.pipeline=4", "parallel.tensor=1", "parallel.sequence=false", "parallel.data=2"
    ).stages
    assert [stage.micro_batches_in_flight for stage in stages] == [4, 3, 2, 1]
    assert stages[0].vision_activations > 0 == stages[1].vision_activations


@pytest.mark.parametrize(("chunks", "expected"), [(1, [4, 3, 2, 1]), (2, [5.5, 4.5, 3.5, 2.5])])
@pytest.mark.parametrize("micro_batches", [4, 8, 16])
def test_micro_batches_in_flight_are_the_schedules(monkeypatch, chunks, expected, micro_batches):
    """One more than megatron-core's own warm-up counts."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    derived = SimpleNamespace(pipeline_size=4, virtual_pipeline_size=chunks)
    for stage in range(4):
        for name, value in (
            ("get_pipeline_model_parallel_world_size", 4),
            ("get_pipeline_model_parallel_rank", stage),
            ("get_virtual_pipeline_model_parallel_world_size", chunks if chunks > 1 else None),
        ):
            monkeypatch.setattr(parallel_state, name, lambda value=value: value)
        total, _, warm_up, _ = get_pp_rank_microbatches(micro_batches, chunks, 4)
        held = in_flight(derived, stage, micro_batches)
        assert held == min(warm_up + 1, total) / chunks
        if micro_batches == 16:
            assert held == expected[stage]


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_images_in_flight_are_the_schedules(monkeypatch, stages, chunks):
    """The order of megatron-core's schedules on stage 0, followed micro-batch by micro-batch.

    Its warm-up count of forward passes, then forward and backward in turn, then what is left; which chunk a pass is of
    by its own table, backwards with the chunks in reverse.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for name, value in (
        ("get_pipeline_model_parallel_world_size", stages),
        ("get_pipeline_model_parallel_rank", 0),
        ("get_virtual_pipeline_model_parallel_world_size", chunks if chunks > 1 else None),
    ):
        monkeypatch.setattr(parallel_state, name, lambda value=value: value)
    for groups in (1, 2, 3, 5):
        micro_batches = groups * stages
        total, _, warm_up, left = get_pp_rank_microbatches(micro_batches, chunks, stages)
        table = get_schedule_table(micro_batches, chunks, stages)
        passes = [("forward", index) for index in range(warm_up)]
        for index in range(left):
            passes += [("forward", warm_up + index), ("backward", index)]
        passes += [("backward", index) for index in range(left, total)]
        held, most = set(), 0
        for kind, index in passes:
            micro_batch, chunk = table[index]
            if kind == "forward" and chunk == 0:
                held.add(micro_batch)
            if kind == "backward" and chunks - 1 - chunk == 0:
                held.remove(micro_batch)
            most = max(most, len(held))
        derived = SimpleNamespace(pipeline_size=stages, virtual_pipeline_size=chunks)
        assert images_in_flight(derived, micro_batches) == most
        assert not held


def test_servers_take_nothing_of_the_trainers_and_are_judged_too():
    plan = planned("7b", "rollout.engine=server", "rollout.servers=http://a:1", "rollout.gpu_memory_fraction=0.9")
    assert {stage.engine for stage in plan.stages} == {EngineShare()}
    assert plan.engine.reserve == pytest.approx(0.9 * plan.device.memory)


def test_a_step_is_faster_on_more_and_on_faster_devices():
    step = planned("7b").time
    assert planned("7b", "parallel.data=4", world_size=16, on=device(16)).time.update < 0.6 * step.update
    assert planned("7b", on=device(gpu="b200")).time.total < step.total
    assert planned("7b", on=device(matmul_efficiency=0.2)).time.update > 1.8 * step.update
    assert planned("7b", "algorithm.kl_coefficient=0").time.log_probs < step.log_probs
    beside = planned(
        "7b", "rollout.engine=server", "rollout.servers=http://a:1", "rollout.max_staleness=1",
        "algorithm.importance_correction=truncated",
    ).time  # fmt: skip
    assert beside.total < beside.generate + beside.update + beside.log_probs


def test_search_proposes_layouts_that_the_plan_accepts():
    config = load_config(EXAMPLES / "3b.yaml", [f"model.path={EXAMPLES / '3b'}"]).config
    numbers = read_architecture_numbers(EXAMPLES / "3b")
    result = search(config, numbers, device(4), processes=4, limit=3, elsewhere=True)
    assert 0 < result.fitting < result.tried
    assert len(result.proposals) == 3
    best = planned("3b", *result.proposals[0].overrides, world_size=4, on=device(4))
    assert best.engine.concurrent_sequences == config.rollout.max_concurrent_sequences  # its share is chosen too
    assert best.time.total <= planned("3b", "parallel.data=2", world_size=4, on=device(4)).time.total
    seconds = [proposal.seconds for proposal in result.proposals]
    assert seconds == sorted(seconds)
    for proposal in result.proposals:
        plan = planned("3b", *proposal.overrides, world_size=4, on=device(4))
        assert not plan.obstacles
        assert plan.time.total == pytest.approx(proposal.seconds)


@pytest.mark.parametrize("settings", [(), ("actor.micro_batch_tokens=8192",)])
def test_search_is_not_slower_than_what_is_shipped(settings):
    """Also where a view is split: a larger micro-batch is tried."""
    overrides = [f"model.path={EXAMPLES / '3b'}", *settings]
    config = load_config(EXAMPLES / "3b_one_gpu.yaml", overrides).config
    numbers = read_architecture_numbers(EXAMPLES / "3b")
    derived = derive(config, world_size=1, architecture=numbers, elsewhere=True)
    shipped = make_device_plan(config, derived, numbers, device(1))
    assert (shipped.time.view_parts > 1) == bool(settings)
    result = search(config, numbers, device(1), processes=1, limit=1, elsewhere=True)
    assert result.proposals[0].seconds <= shipped.time.total / (1.2 if settings else 1)


def test_search_says_when_nothing_fits(capsys):
    assert main([*arguments("72b"), "--gpu", "h100-80g", "--gpus", "4", "--search"]) == 2
    assert "none fits" in capsys.readouterr().err


@pytest.mark.parametrize("name", [one.name for one in fields(Assumptions) if not one.name.endswith(("_share", "_gb"))])
def test_the_least_that_an_assumption_can_be_is_planned(name):
    least = 1e-6 if name.endswith("_efficiency") else 0
    for settings in ((), ("rollout.engine=embedded",)):
        assert planned("7b", *settings, on=device(**{name: least})).time.total > 0


def test_no_more_is_planned_with_than_cuda_gives():
    """As torch's messages in the logs of others have it: the least of each."""
    for key, seen in (("a100-80g", 79.14), ("h100-80g", 79.11), ("h200", 139.72), ("b200", 178.35)):
        assert device(gpu=key).memory <= seen * GIB
    assert Device.of(gpu_of("h200"), Assumptions(), processes=1, memory_gib=100).memory == 100 * GIB


def test_devices_have_sources():
    assert all(gpu.source and gpu.key == key for key, gpu in GPUS.items())
    with pytest.raises(UserError, match="h300"):
        gpu_of("h300")
