import numpy as np
import pytest
import torch
from growth import least_seconds
from tiny_policy import hf_config

from perl_megatron.model.architecture import VisionArchitecture
from perl_megatron.model.segments import make_segments, vision_plan

VISION = VisionArchitecture(
    depth=4,
    hidden_size=160,
    ffn_size=120,
    num_heads=8,
    in_channels=3,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_size=56,
    full_attention_blocks=(1, 3),
    out_hidden_size=192,
)


@pytest.mark.parametrize(
    "grids",
    [
        ((1, 2, 2),),
        ((1, 4, 6), (1, 10, 8), (1, 2, 2)),
        ((1, 2, 2), (1, 2, 2), (1, 2, 14), (1, 2, 2)),
        ((2, 6, 10), (1, 4, 4)),
    ],
)
def test_equals_transformers(grids):
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

    plan = vision_plan(grids, VISION)
    tensor = torch.tensor(grids)
    order, window = get_vision_window_index(tensor, 2, VISION.window_size, VISION.patch_size)
    assert torch.equal(plan.order, order)
    assert torch.equal(plan.order[plan.inverse], torch.arange(len(order)))
    assert torch.equal(plan.segments.window.cumulative_lengths, window)
    assert torch.equal(plan.segments.full.cumulative_lengths, get_vision_cu_seqlens(tensor))
    positions = get_vision_position_ids(tensor, 2).float().unflatten(0, (-1, 4))[order].flatten(0, 1)
    frequencies = 10000.0 ** (-torch.arange(0, 10, 2) / 10)  # head_dim 20: 10 for rows, 10 for columns
    expected = torch.cat([positions[:, :1] * frequencies, positions[:, 1:] * frequencies], -1).repeat(1, 2)
    torch.testing.assert_close(plan.angles[:, 0, 0], expected, rtol=1e-5, atol=1e-6)


def test_blocks_of_both_kinds():
    segments = vision_plan(((1, 8, 8),), VISION).segments
    assert [segments.of_block(block).longest for block in range(4)] == [16, 64, 16, 64]


def test_groups_hold_every_token_once_in_segments_of_one_length():
    segments = make_segments(np.array([4, 16, 4, 8]))
    assert [tuple(group.shape) for group in segments.groups] == [(2, 4), (1, 8), (1, 16)]
    tokens = torch.arange(32)
    regrouped = torch.cat([tokens[group].flatten() for group in segments.groups])
    assert torch.equal(regrouped[segments.inverse], tokens)
    assert segments.groups[0].tolist() == [[0, 1, 2, 3], [20, 21, 22, 23]]


def test_many_small_images_are_planned_without_a_loop_over_them():
    """Ten thousand take less time than half as many whose sizes alternate, over which it does loop."""
    equal, alternating = ((1, 2, 2),) * 10_000, ((1, 2, 2), (1, 2, 4)) * 2500
    plan = vision_plan(equal, VISION)
    quick, slow = (least_seconds(lambda g=grids: vision_plan.__wrapped__(g, VISION)) for grids in (equal, alternating))
    assert quick < slow
    assert plan.segments.window.inverse is None  # one attention call
    assert vision_plan(equal, VISION) is plan


def test_tiny_config_matches_the_architecture_used_here(tmp_path):
    from perl_megatron.model.architecture import read_architecture

    hf_config(tied=False).save_pretrained(tmp_path)
    vision = read_architecture(tmp_path).vision
    assert (vision.window_size, vision.head_dim, vision.patch_values) == (VISION.window_size, 40, 1176)
