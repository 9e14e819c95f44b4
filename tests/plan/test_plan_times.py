"""Seconds of a step against counts by hand: recomputed attention, decoding, whole images, the optimizer."""

from dataclasses import replace

import numpy as np
import pytest
from derive_case import TINY, config_of

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.work import ViewWork
from perl_megatron.config.derive import derive
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.device_plan import Device, make_device_plan
from perl_megatron.plan.gpus import gpu_of
from perl_megatron.plan.parameters import chunk_parameters, count, decoded_count, total_count
from perl_megatron.plan.workload import largest_image, most_patches

H100 = gpu_of("h100-80g")
BASE = ("algorithm.kl_coefficient=0", "data.max_prompt_tokens=256", "data.max_pixels=25088")
"""Images of 32 cells at most."""


def plan_of(*settings, world_size=1, numbers=TINY, gpu=H100, **assumed):
    config = config_of(*BASE, *settings)
    derived = derive(config, world_size=world_size, architecture=numbers, elsewhere=True)
    return make_device_plan(config, derived, numbers, Device.of(gpu, replace(Assumptions(), **assumed), processes=1))


@pytest.mark.parametrize("sharing", ["full", "vision"])
def test_the_attention_alone_pair_by_pair(sharing):
    """A pair of a query and a key takes a product of head size twice, of 2 operations each, for every head."""
    view, prompt = ViewWork((0, 1), 7, (3, 5), (("a", 16), ("b", 80))), 7
    # Padded rows are as long as the longer one.
    rows = [(0, prompt), (prompt, 2), (prompt, 4)] if sharing == "full" else [(0, 12), (0, 12)]
    pairs = sum(sum(behind + own + 1 for own in range(tokens)) for behind, tokens in rows)
    flops = CostModel(TINY, sharing, backward=False).attention_flops([view])
    assert flops.prompt + flops.response + flops.padding == pairs * TINY.num_layers * 4 * TINY.num_heads * TINY.head_dim
    windows, full = 16 * 16 + 80 * 64, 16 * 16 + 80 * 80
    assert flops.vision == 4 * TINY.vision_hidden_size * (3 * windows + full)
    assert flops.loss == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_selective_recomputation_costs_the_attention_once_more(frozen):
    """One process and no messages: the update is arithmetic, and the optimizer's traffic, which is the same."""
    settings = ("optimizer.vision_multiplier=0",) if frozen else ()
    none, selective, full = (
        plan_of(*settings, f"model.recompute={recompute}") for recompute in ("none", "selective", "full")
    )
    group, groups = none.workload.group, 128
    forward = CostModel(TINY, backward=False)
    attention, whole = forward.attention_flops(group), forward.flops(group)
    again = attention.prompt + attention.response + (0 if frozen else attention.vision)
    of_all = whole.total - whole.loss - (whole.vision if frozen else 0)
    per_second = H100.flops * Assumptions().matmul_efficiency
    assert selective.time.update - none.time.update == pytest.approx(groups * again / per_second)
    assert full.time.update - none.time.update == pytest.approx(groups * of_all / per_second)
    assert selective.time.update_flops == none.time.update_flops


@pytest.mark.parametrize("tied", [False, True])
def test_decoding_reads_the_language_model_and_one_matrix_of_the_vocabulary(tied):
    numbers = replace(TINY, tied_embeddings=tied)
    tower = count(chunk_parameters(numbers, config_of().parallel, 0), {"vision", "merger"})
    vocabulary = numbers.vocabulary_size * numbers.hidden_size
    assert decoded_count(numbers) == total_count(numbers) - tower - (0 if tied else vocabulary)
    heads = numbers.num_heads * numbers.head_dim
    keys = numbers.num_kv_heads * numbers.head_dim
    layer = numbers.hidden_size * (2 * heads + 2 * keys + 3 * numbers.ffn_size) + heads + 2 * keys
    layer += 2 * numbers.hidden_size
    assert decoded_count(numbers) == numbers.num_layers * layer + numbers.hidden_size + vocabulary


def test_a_token_takes_as_long_as_its_weights_and_its_cache_are_read():
    """Of one sequence at a time, whose prompt takes nothing, by a device that computes in no time."""
    fast = replace(H100, flops=1e30)
    settings = ("rollout.engine=vllm", "rollout.max_concurrent_sequences=1", "rollout.max_response_tokens=100")
    plan = plan_of(*settings, gpu=fast, decode_overhead_ms=0, response_share=1.0, prompt_share=1 / 256)
    context, tokens = 1 + 100 / 2, 128 * 12 * 100
    read = 2 * decoded_count(TINY) + context * 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 2
    assert plan.time.generate == pytest.approx(tokens * read / (H100.bandwidth * Assumptions().bandwidth_efficiency))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("images", [1, 2, 3, 5, 8, 9])
def test_whole_images_are_dealt_as_the_tower_deals_them(ranks, images):
    from perl_megatron.model.vision_shares import share_images

    grids = ((1, 4, 6),) * images
    dealt = [len(share_images(grids, TINY, rank, ranks).images) for rank in range(ranks)]
    assert most_patches(24 * images, 24, ranks) == pytest.approx(24 * max(dealt))
    # Of images that are not all of one size the most is that of as many of the largest, or less.
    mixed = tuple((1, 2 * (1 + index % 3), 4) for index in range(images))
    shares = [share_images(mixed, TINY, rank, ranks).images for rank in range(ranks)]
    most = max(sum(int(np.prod(mixed[image])) for image in share) for share in shares)
    assert most <= most_patches(24 * images, 24, ranks)


def test_the_mean_question_has_few_large_images():
    """115 cells of 128 prompt tokens, in images of at most 32."""
    plan = plan_of()
    images = plan.workload.group[0].images
    assert [patches // 4 for _, patches in images] == [29, 29, 29, 28]
    assert largest_image(config_of(*BASE), TINY) == 4 * 32
    assert largest_image(config_of("data.max_prompt_tokens=20"), TINY) == 4 * 20
    assert [view.images for view in plan.workload.group] == [images] * 2  # the views share them
    assert len(plan_of(image_size_share=0.5).workload.group[0].images) == 8


def test_a_replicated_tower_waits_for_the_rank_with_most_images():
    """Against a sharded one, on two ranks with messages that take no time: three images in each micro-batch."""
    near = replace(H100, link=1e30)
    settings = ("parallel.tensor=2", "model.recompute=none", "rollout.max_response_tokens=64")
    budget = plan_of(*settings, world_size=2, prompt_share=0.35).workload.group_memory
    settings = (*settings, f"actor.micro_batch_tokens={budget}")
    sharded, replicated = (
        plan_of(*settings, f"parallel.vision={vision}", world_size=2, gpu=near, prompt_share=0.35)
        for vision in ("sharded", "replicated")
    )
    group = replicated.workload.group
    assert [len(view.images) for view in group] == [3, 3]
    assert replicated.time.image_runs == 1
    assert replicated.time.micro_batches == 128 / config_of(*BASE).algorithm.updates_per_step
    vision = CostModel(TINY).flops(group).vision
    more = 128 * (2 / 3 - 1 / 2) * vision / (H100.flops * Assumptions().matmul_efficiency)
    towers = [
        count(chunk_parameters(TINY, config_of(*BASE, *settings, f"parallel.vision={one}").parallel, 0))
        for one in ("sharded", "replicated")
    ]
    optimizer = 42 * (towers[1] - towers[0]) / (H100.bandwidth * Assumptions().bandwidth_efficiency)
    updates = replicated.time.update - sharded.time.update
    assert updates == pytest.approx(more + config_of(*BASE).algorithm.updates_per_step * optimizer, rel=1e-6)


@pytest.mark.parametrize(("dtype", "bytes_of_number"), [("float32", 28 + 8), ("bfloat16", 28 + 8 + 6)])
def test_the_optimizer_reads_four_numbers_and_writes_three(dtype, bytes_of_number):
    """On a device that computes in no time and sends nothing."""
    fast = replace(H100, flops=1e30, flops_float32=1e30)
    plan = plan_of(f"model.dtype={dtype}", "algorithm.updates_per_step=1", gpu=fast)
    seconds = bytes_of_number * total_count(TINY) / (H100.bandwidth * Assumptions().bandwidth_efficiency)
    assert plan.time.update == pytest.approx(seconds)
