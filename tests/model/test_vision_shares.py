"""Who encodes what, and that all is found again; tests/distributed compares such towers with transformers."""

import itertools

import numpy as np
import pytest
import torch
from derive_case import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

from perl_megatron.batching.cost import CostModel
from perl_megatron.model.vision_shares import share_images

sides = st.integers(1, 6).map(lambda cells: 2 * cells)
images = st.lists(st.tuples(st.integers(1, 2), sides, sides), min_size=1, max_size=9).map(tuple)


@settings(deadline=None, max_examples=60)
@given(grids=images, size=st.integers(1, 5))
def test_every_cell_is_encoded_once_and_found_again(grids, size):
    shares = [share_images(grids, TINY, rank, size) for rank in range(size)]
    assert sorted(itertools.chain(*(share.images for share in shares))) == list(range(len(grids)))
    counts = [int(np.prod(grid)) // 4 for grid in grids]
    cells_of_image = torch.arange(sum(counts)).split(counts)
    for share in shares:
        assert list(share.images) == sorted(share.images)
        expected = [cells_of_image[image] for image in share.images]
        assert torch.equal(share.cells, torch.cat(expected) if expected else torch.zeros(0, dtype=torch.int64))
    # As ``exchange`` lays them out: the rows of each rank, filled up to those of the rank that has most.
    longest = max(len(share.cells) for share in shares)
    gathered = torch.cat([pad(share.cells, (0, longest - len(share.cells)), value=-1) for share in shares])
    for share in shares:
        assert share.longest == longest
        assert torch.equal(gathered[share.places], torch.arange(sum(counts)))


def test_ranks_beyond_the_images_encode_nothing():
    shares = [share_images(((1, 4, 4),), TINY, rank, 3) for rank in range(3)]
    assert [share.images for share in shares] == [(0,), (), ()]
    assert [len(share.cells) for share in shares] == [4, 0, 0]


def test_one_large_image_weighs_more_than_its_patches():
    """Full attention costs the square: four images with a quarter of the patches each are cheaper, and a fifth fits."""
    assert images_of_ranks(((1, 48, 48), *[(1, 24, 24)] * 5)) == [(0,), (1, 2, 3, 4, 5)]


def test_frames_weigh_less_than_one_frame_of_their_patches():
    """The costliest goes to the first rank: not two frames, which do not attend to each other."""
    assert images_of_ranks(((2, 24, 24), (1, 24, 48))) == [(1,), (0,)]
    assert images_of_ranks(((2, 24, 24), (1, 24, 24), (1, 24, 24))) == [(0,), (1, 2)]


def images_of_ranks(grids):
    return [share_images(grids, TINY, rank, 2).images for rank in range(2)]


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 16, 12), (2, 8, 4), (1, 2, 4)])
def test_the_cost_is_what_the_tower_multiplies(tower, grid):
    """Of images of whole windows: ``share_images`` takes each frame for an image. The counter sees no kernels."""
    time, height, width = grid
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tower(torch.randn(time * height * width, 1176), torch.tensor([grid]))
    cost = CostModel(tower.numbers, backward=False)
    assert counter.get_total_flops() == time * cost.image_flops(height * width)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    from tiny_policy import hf_config

    from perl_megatron.config.schema import ModelConfig, ParallelConfig
    from perl_megatron.model.architecture import read_architecture
    from perl_megatron.model.policy import build_policy
    from perl_megatron.runtime import topology

    folder = tmp_path_factory.mktemp("policy")
    hf_config(tied=False).save_pretrained(folder)
    layout = topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    model = ModelConfig(path=folder, dtype="float32")
    (policy,) = build_policy(read_architecture(folder), model, ParallelConfig(), layout)
    yield policy.vision_model
    topology.shutdown()
