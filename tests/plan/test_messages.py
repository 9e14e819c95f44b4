"""Messages and passes by hand: one layer, one update, one bubble."""

from dataclasses import replace

import pytest
from derive_case import TINY, config_of

from perl_megatron.config.derive import derive
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.communication import (
    Links,
    model_parallel_gradients,
    pass_traffic,
    sync_seconds,
    update_traffic,
)
from perl_megatron.plan.device_plan import Device, make_device_plan
from perl_megatron.plan.gpus import gpu_of
from perl_megatron.plan.parameters import chunk_parameters, count, total_count

H100 = gpu_of("h100-80g")


def case(*settings, world_size):
    config = config_of(*settings)
    return config, derive(config, world_size=world_size, architecture=TINY)


@pytest.mark.parametrize(
    ("settings", "backward", "all_reduces"),
    [
        ((), False, 2),
        ((), True, 4),
        (("model.recompute=full",), True, 6),
        (("parallel.sequence=true",), True, 5),  # two gathers more: an all-reduce's volume
    ],
)
def test_tensor_parallel_messages_of_a_layer(settings, backward, all_reduces):
    config, derived = case("parallel.tensor=2", "parallel.pipeline=2", *settings, world_size=4)
    sent = pass_traffic(config, derived, TINY, 1, tokens=100, patches=0, share=1, backward=backward)
    of_layer = 2 * (1 / 2) * 2 * 100 * TINY.hidden_size  # ring over two ranks, bfloat16
    assert sent.tensor == pytest.approx(derived.stage_layers[1] * all_reduces * of_layer)


def test_stages_send_hidden_states_forwards_and_gradients_back():
    config, derived = case("parallel.pipeline=2", world_size=2)
    message = 2 * 100 * TINY.hidden_size
    first, last = (
        [
            pass_traffic(config, derived, TINY, stage, tokens=100, patches=0, share=1, backward=back).pipeline
            for back in (0, 1)
        ]
        for stage in (0, 1)
    )
    assert first == [message, message]
    assert last == [0, message]


@pytest.mark.parametrize(("distributed", "bytes_of_number"), [("true", 4 + 2), ("false", 4 + 4)])
def test_replicas_exchange_gradients_and_parameters(distributed, bytes_of_number):
    config, derived = case(f"optimizer.distributed={distributed}", world_size=4)
    numbers = count(chunk_parameters(TINY, config.parallel, 0))
    assert update_traffic(config, derived, TINY, 0) == pytest.approx(3 / 4 * numbers * bytes_of_number)


@pytest.mark.parametrize(
    ("settings", "all_reduces"),
    [
        ((), 4),
        (("model.recompute=full",), 6),
        (("optimizer.vision_multiplier=0",), 2),
        (("optimizer.vision_multiplier=0", "model.recompute=full"), 2),
    ],
)
def test_a_frozen_tower_sends_nothing_backwards(settings, all_reduces):
    config, derived = case("parallel.tensor=2", *settings, world_size=2)
    with_images, without = (
        pass_traffic(config, derived, TINY, 0, tokens=100, patches=patches, share=1, backward=True).tensor
        for patches in (200, 0)
    )
    of_block = 2 * (1 / 2) * 2 * 200 * TINY.vision_hidden_size
    assert with_images - without == pytest.approx(TINY.vision_depth * all_reduces * of_block)


def test_a_replicated_tower_gathers_as_many_rows_as_the_fullest_rank_has():
    """Three images over two ranks: two thirds of 300 cells from each, which sends them to the other one."""
    config, derived = case("parallel.tensor=2", "parallel.vision=replicated", world_size=2)
    with_images, without = (
        pass_traffic(config, derived, TINY, 0, tokens=100, patches=patches, share=2 / 3, backward=True).tensor
        for patches in (1200, 0)
    )
    assert with_images - without == pytest.approx(2 * 200 * TINY.vision_out_hidden_size)


def test_gradients_of_a_replicated_tower_go_over_the_tensor_parallel_ranks():
    """As ``train/optimizer.py`` adds them up; a tied embedding's go between the first stage and the last."""
    tied = replace(TINY, tied_embeddings=True)
    config, derived = case("parallel.tensor=2", "parallel.pipeline=2", "parallel.vision=replicated", world_size=4)
    parameters = chunk_parameters(tied, config.parallel, 0)
    tower = sum(one.count for one in parameters if one.part != "language")
    sent = model_parallel_gradients(config, derived, tied, 0)
    assert sent == {"tensor": 4 * tower, "pipeline": 4 * tied.vocabulary_size * tied.hidden_size / 2}
    assert model_parallel_gradients(config, derived, tied, 1) == {"tensor": 0, "pipeline": sent["pipeline"]}
    frozen, derived = case(
        "parallel.tensor=2", "parallel.vision=replicated", "optimizer.vision_multiplier=0", world_size=2
    )
    merger = sum(one.count for one in chunk_parameters(TINY, frozen.parallel, 0) if one.part == "merger")
    assert model_parallel_gradients(frozen, derived, TINY, 0) == {"tensor": 4 * merger, "pipeline": 0}


def test_links_are_those_of_the_node_only_within_it():
    _, narrow = case("parallel.tensor=2", world_size=8)
    _, wide = case("parallel.tensor=2", world_size=16)
    assumptions = Assumptions(link_efficiency=1, network_efficiency=1)
    near, far = Links(narrow, H100, assumptions), Links(wide, H100, assumptions)
    assert near.seconds("data", H100.link) == far.seconds("tensor", H100.link) == 1
    assert far.seconds("data", H100.network) == 1
    assert not far.within_node("data")


def test_a_sync_over_a_disk_writes_and_reads_the_model():
    servers = ("rollout.engine=server", "rollout.servers=http://a:1", "rollout.weight_transfer=disk")
    config, derived = case(*servers, "rollout.shared_folder=w", world_size=1)
    assumptions = Assumptions(disk_gb=1)
    model, seconds = sync_seconds(config, derived, TINY, Links(derived, H100, assumptions), assumptions)
    assert model == 2 * total_count(TINY)
    assert seconds == pytest.approx(2 * model / 1e9)


@pytest.mark.parametrize(("chunks", "waiting"), [(1, 1), (2, 0.5)])
def test_the_bubble_is_the_stages_waiting(chunks, waiting):
    config, derived = case("parallel.pipeline=2", f"parallel.virtual_pipeline={chunks}", world_size=2)
    time = make_device_plan(config, derived, TINY, Device.of(H100, Assumptions(), processes=2)).time
    assert time.bubble == pytest.approx(waiting / (time.micro_batches + waiting))
    alone, derived = case(world_size=1)
    assert make_device_plan(alone, derived, TINY, Device.of(H100, Assumptions(), processes=1)).time.bubble == 0
