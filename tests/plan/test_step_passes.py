"""Times of passes are those of the micro-batches that the trainer's planner makes: counts, arithmetic, messages."""

from dataclasses import replace

import pytest
from derive_case import TINY, config_of

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.micro_batches import plan_micro_batches
from perl_megatron.batching.work import ViewWork
from perl_megatron.config.derive import derive
from perl_megatron.config.layout import micro_batch_multiple
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.communication import pass_traffic
from perl_megatron.plan.device_plan import Device, make_device_plan
from perl_megatron.plan.gpus import gpu_of

NEAR = replace(gpu_of("h100-80g"), bandwidth=1e40, link=1e40, network=1e40)
"""Arithmetic alone takes time."""
PER_SECOND = NEAR.flops * Assumptions().matmul_efficiency
BASE = (
    *("data.max_prompt_tokens=256", "data.max_pixels=25088", "rollout.max_response_tokens=78"),
    *("rollout.num_rollouts=3", "rollout.questions_per_step=10", "algorithm.updates_per_step=2"),
    *("algorithm.kl_coefficient=0", "model.recompute=none"),
)
"""Groups of two views of 128 tokens, 3 responses of 39 to each, and 4 images of 29 cells that both have."""


def plan_of(*settings, world_size=1, gpu=NEAR):
    config = config_of(*BASE, *settings)
    derived = derive(config, world_size=world_size, architecture=TINY, elsewhere=True)
    return config, derived, make_device_plan(config, derived, TINY, Device.of(gpu, Assumptions(), processes=1))


def planned(config, derived, questions):
    """[data rank][micro-batch] → views, by the planner, of groups that are written down here once more."""
    cost = CostModel(TINY, config.actor.sharing)
    images = tuple((f"{index}", 4 * cells) for index, cells in enumerate((29, 29, 29, 28)))
    views = [
        ViewWork(
            tuple(range(3 * at, 3 * at + 3)), 128, (39, 39, 39), tuple((f"{at // 2}, {key}", n) for key, n in images)
        )
        for at in range(2 * questions)
    ]
    plan = plan_micro_batches(
        views,
        cost,
        token_budget=config.actor.micro_batch_tokens,
        data_size=derived.data_size,
        stages=derived.pipeline_size,
        multiple=micro_batch_multiple(config.parallel),
    )

    def parts(indices):
        own = {at: [index % 3 for index in indices if index // 3 == at] for at in {index // 3 for index in indices}}
        return [views[at].part(members) for at, members in own.items()]

    return [[parts(indices) for indices in rank] for rank in plan]


@pytest.mark.parametrize("budget", [150, 400, 700, 2000, 100_000])
@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ((), 1),
        ((), 3),
        (("parallel.pipeline=2",), 4),
        (("parallel.pipeline=2", "parallel.virtual_pipeline=2"), 4),
        (("actor.sharing=vision",), 2),
        (("actor.sharing=none",), 2),
    ],
)
def test_counts_and_arithmetic_are_those_of_the_planners_micro_batches(settings, world_size, budget):
    config, derived, plan = plan_of(*settings, f"actor.micro_batch_tokens={budget}", world_size=world_size)
    ranks = planned(config, derived, 5)
    cost = CostModel(TINY, config.actor.sharing)
    assert {len(rank) for rank in ranks} == {plan.time.micro_batches}
    computed = sum(cost.flops(views).total for rank in ranks for views in rank)
    assert plan.time.computed_flops == 2 * computed
    assert plan.time.update_flops == 10 * cost.flops(plan.workload.group).total <= plan.time.computed_flops
    assert plan.time.view_parts == sum(len(views) for rank in ranks for views in rank) / 10
    encoded = sum(sum(cost.encoded_images(views)) for rank in ranks for views in rank)
    assert plan.time.image_runs == pytest.approx(encoded / (5 * 4 * 115))


@pytest.mark.parametrize("budget", [400, 2000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_rank_with_most_to_compute_decides(world_size, budget):
    """An update over its own groups, log-probabilities over all of the step at once."""
    config, derived, plan = plan_of(f"actor.micro_batch_tokens={budget}", world_size=world_size)
    both, forward = (
        max(sum(CostModel(TINY, backward=backward).flops(views).total for views in rank) for rank in ranks) / PER_SECOND
        for backward, ranks in ((True, planned(config, derived, 5)), (False, planned(config, derived, 10)))
    )
    assert plan.time.update == pytest.approx(2 * both)
    assert plan.time.log_probs == pytest.approx(forward)


@pytest.mark.parametrize("chunks", [1, 2])
def test_stages_work_on_all_and_wait_for_the_largest(chunks):
    """Micro-batches of different sizes: five groups, two of which fit into one."""
    settings = ("parallel.pipeline=2", f"parallel.virtual_pipeline={chunks}", "actor.micro_batch_tokens=1500")
    config, derived, plan = plan_of(*settings, world_size=2)
    flops = [CostModel(TINY).flops(views) for views in planned(config, derived, 5)[0]]
    assert len({one.total for one in flops}) > 1
    stages = [
        [(one.prompt + one.response) / 2 + one.vision for one in flops],
        [(one.prompt + one.response) / 2 + one.loss for one in flops],
    ]
    taken = max((sum(stage) + max(stage) / chunks, max(stage) / chunks) for stage in stages)
    assert plan.time.update == pytest.approx(2 * taken[0] / PER_SECOND)
    assert plan.time.bubble == pytest.approx(taken[1] / taken[0])


def test_a_view_that_is_split_takes_longer_and_is_remarked():
    group, view = plan_of()[2].workload.group_memory, plan_of()[2].workload.view_memory
    whole, single, split, rows = (
        plan_of(f"actor.micro_batch_tokens={budget}")[2] for budget in (group, group - 1, view - 1, 1)
    )
    seconds = [one.time.update for one in (whole, single, split, rows)]
    assert seconds == sorted(set(seconds))
    assert [one.time.view_parts for one in (whole, single, split, rows)] == [1, 1, 2, 3]
    assert [one.time.image_runs for one in (whole, single, split, rows)] == [1, 2, 4, 6]
    found = [
        {remark.name for remark in one.remarks} & {"views are split", "images encoded again"}
        for one in (whole, single, split, rows)
    ]
    assert found == [set(), {"images encoded again"}, {"views are split"}, {"views are split"}]
    (remark,) = [one for one in split.remarks if one.name == "views are split"]
    assert f"takes {view} of" in remark.text
    assert "divided over 2 micro-batches" in remark.text
    assert f"({split.workload.largest_view_memory} holds" in remark.fix
    largest = plan_of(f"actor.micro_batch_tokens={split.workload.largest_view_memory}", world_size=1)[2]
    assert largest.time.view_parts == 1
    # Useful work stays what it is, so less of the peak is used.
    assert whole.time.update_flops == rows.time.update_flops
    assert whole.time.model_flops_share > 2 * rows.time.model_flops_share


@pytest.mark.parametrize("budget", [300, 1200])
def test_messages_are_those_of_padded_micro_batches(budget):
    settings = ("parallel.tensor=2", "parallel.sequence=true", f"actor.micro_batch_tokens={budget}")
    config, derived, plan = plan_of(*settings, world_size=2)
    cost, sent = CostModel(TINY), 0.0
    for questions, times, backward in ((10, 1, False), (5, 2, True)):
        for views in planned(config, derived, questions)[0]:
            tokens = sum(map(cost.view_tokens, views))
            sent += times * pass_traffic(
                config,
                derived,
                TINY,
                0,
                tokens=tokens + tokens % 2,
                patches=sum(cost.encoded_images(views)),
                share=1 / 2,
                backward=backward,
            ).tensor  # fmt: skip
    (row,) = [one for one in plan.time.traffic if one.name == "tensor"]
    assert row.bytes_sent == pytest.approx(sent, rel=1e-12)
