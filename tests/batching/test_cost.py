"""Costs against numbers worked out by hand, and against what torch counts in transformers' model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from derive_case import TINY
from tiny_policy import IMAGE_TOKEN, hf_model
from torch.utils.flop_counter import FlopCounterMode

from perl_megatron.batching.cost import CostModel, Flops, step_flops
from perl_megatron.batching.work import ViewWork, clusters, distinct_images, views_of
from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.types import EncodedPrompt
from perl_megatron.verification.layout import TEXT, VISION

ROUND = ArchitectureNumbers(
    num_layers=2,
    hidden_size=10,
    ffn_size=20,
    num_heads=3,
    num_kv_heads=1,
    head_dim=4,
    vocabulary_size=100,
    vision_depth=3,
    vision_hidden_size=8,
    vision_ffn_size=5,
    vision_num_heads=2,
    vision_out_hidden_size=10,
    vision_patch_values=7,
    vision_merge_size=2,
    vision_window_patches=16,
    vision_full_attention_blocks=(1, 9),
)
TOKEN = 2 * (2 * 10 * 12 * 2 + 2 * 10 * 4 * 2 + 3 * 2 * 10 * 20)
"""Forward: query and output projections, key and value projections, three matrices of the feed-forward layer."""
PAIR = 2 * 2 * 2 * 12
"""Two layers, two products over heads · head size = 12."""
LOSS = 2 * 10 * 100


def image(patches: int, *, backward: bool) -> int:
    """One full-attention block of three (block 9 does not exist)."""
    blocks = 3 * (2 * 8 * 24 + 2 * 8 * 8 + 3 * 2 * 8 * 5)
    pairs = patches * (patches + 2 * min(patches, 16))
    merger = 2 * 32 * (32 + 10)
    embedding = 2 * 7 * 8
    rest = patches * blocks + pairs * 4 * 8 + patches // 4 * merger
    return 3 * rest + 2 * patches * embedding if backward else rest + patches * embedding


VIEWS = [
    ViewWork((0, 1), 6, (4, 1), (("a", 8), ("b", 24), ("a", 8))),
    ViewWork((2, 3), 7, (3, 0), (("b", 24),)),
]


def test_an_image_is_counted_by_hand():
    for patches in (4, 16, 40):
        assert CostModel(ROUND).image_flops(patches) == image(patches, backward=True)
        assert CostModel(ROUND, backward=False).image_flops(patches) == image(patches, backward=False)
        assert CostModel(ROUND, vision_backward=False).image_flops(patches) == image(patches, backward=False)


def test_full_sharing_counts_everything_once_and_leaves_out_last_tokens():
    expected = Flops(
        vision=image(8, backward=False) + image(24, backward=False),
        prompt=(6 + 7) * TOKEN + (21 + 28) * PAIR,
        # 3 tokens behind 6, none of the second response, 2 tokens behind 7, none of an empty one
        response=(3 + 2) * TOKEN + (3 * 6 + 6 + 2 * 7 + 3) * PAIR,
        loss=8 * LOSS,
    )
    assert CostModel(ROUND, backward=False).flops(VIEWS) == expected
    both = CostModel(ROUND).flops(VIEWS)
    assert (both.prompt, both.response, both.loss) == (3 * expected.prompt, 3 * expected.response, 4 * expected.loss)
    assert both.vision == image(8, backward=True) + image(24, backward=True)
    assert CostModel(ROUND).view_flops(VIEWS[0]) == CostModel(ROUND).flops([replace(VIEWS[0], images=())]).total


def test_rows_are_padded_to_the_longest():
    """Rows of 10, 7, 10 and 7 tokens."""
    cost = CostModel(ROUND, "vision", backward=False)
    rows = {length: length * TOKEN + length * (length + 1) // 2 * PAIR for length in (6, 7, 10)}
    expected = Flops(
        vision=image(8, backward=False) + image(24, backward=False),
        prompt=2 * rows[6] + 2 * rows[7],
        response=2 * rows[10] + 2 * rows[7] - 2 * rows[6] - 2 * rows[7],
        loss=8 * LOSS,
        padding=2 * (rows[10] - rows[7]),
    )
    assert cost.flops(VIEWS) == expected
    assert expected.total == expected.vision + 4 * rows[10] + 8 * LOSS


def test_without_sharing_each_sequence_encodes_all_its_images():
    shared, alone = (CostModel(ROUND, sharing, backward=False).flops(VIEWS) for sharing in ("vision", "none"))
    assert alone.vision == 4 * image(8, backward=False) + 4 * image(24, backward=False)
    assert replace(alone, vision=0) == replace(shared, vision=0)


def test_memory_counts_tokens_and_patches_by_the_width_that_they_go_through():
    """A patch is 8 · 3 / (10 · 2) = 1.2 tokens; an image is rounded down: 9 and 28 tokens."""
    assert [CostModel(ROUND).image_memory(patches) for patches in (8, 24)] == [9, 28]
    assert CostModel(ROUND, "full").memory(VIEWS) == 9 + 28 + (6 + 3) + (7 + 2)
    assert CostModel(ROUND, "vision").memory(VIEWS) == 9 + 28 + 4 * 10
    assert CostModel(ROUND, "none").memory(VIEWS) == 2 * (9 + 28 + 9) + 2 * 28 + 4 * 10


@pytest.mark.parametrize("sharing", ["full", "vision", "none"])
def test_nothing_costs_nothing(sharing):
    assert CostModel(ROUND, sharing).flops([]) == Flops()
    assert CostModel(ROUND, sharing).memory([]) == 0


def test_a_pipeline_fills_and_drains():
    assert step_flops([[4, 2, 2], [3, 3, 3]]) == 9
    assert step_flops([[4, 2, 2], [3, 3, 3]], stages=2) == (8 + 4) / 2
    assert step_flops([[4, 2, 2], [3, 3, 3]], stages=4) == (8 + 3 * 4) / 4
    assert step_flops([[], []], stages=2) == 0


def test_torch_counts_the_same_in_transformers_model():
    """Its attention also computes what the causal mask hides, and its logits are kept, not computed twice."""
    model = hf_model(tied=False)
    model.set_attn_implementation("eager")
    num_image, num_tokens = 24, 40
    ids = torch.tensor([[*[IMAGE_TOKEN] * num_image, *range(3, 3 + num_tokens - num_image)]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(4 * num_image, 1176),
        "image_grid_thw": torch.tensor([[1, 8, 12]]),  # six whole windows
    }
    with FlopCounterMode(display=False) as counter:
        logits = model(**inputs).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    counted = {False: forward, True: counter.get_total_flops()}
    for backward in (False, True):
        cost = CostModel(numbers_of_tiny_policy(), backward=backward)
        hidden_pairs = num_tokens**2 - num_tokens * (num_tokens + 1) // 2
        pair = cost.tokens_flops(1, behind=1) - cost.tokens_flops(1)
        again = 2 * TEXT["hidden_size"] * TEXT["vocab_size"] * num_tokens if backward else 0
        expected = cost.tokens_flops(num_tokens) + hidden_pairs * pair + cost.loss_flops(num_tokens) - again
        assert counted[backward] == expected + cost.image_flops(4 * num_image)


def numbers_of_tiny_policy() -> ArchitectureNumbers:
    return ArchitectureNumbers(
        num_layers=4,
        hidden_size=TEXT["hidden_size"],
        ffn_size=TEXT["intermediate_size"],
        num_heads=TEXT["num_attention_heads"],
        num_kv_heads=TEXT["num_key_value_heads"],
        head_dim=16,
        vocabulary_size=TEXT["vocab_size"],
        vision_depth=VISION["depth"],
        vision_hidden_size=VISION["hidden_size"],
        vision_ffn_size=VISION["intermediate_size"],
        vision_num_heads=VISION["num_heads"],
        vision_out_hidden_size=VISION["out_hidden_size"],
        vision_patch_values=1176,
        vision_merge_size=2,
        vision_window_patches=16,
        vision_full_attention_blocks=(1,),
    )


def test_full_sharing_of_the_papers_group_is_most_of_the_saving():
    """Two images of 1,320 patches, two views, six responses of 256 tokens: prompts and images are most of it."""
    numbers = replace(TINY, num_layers=36, hidden_size=2048, ffn_size=11008, num_heads=16, head_dim=128)
    group = [ViewWork(tuple(range(6)), 720, (256,) * 6, (("a", 1320), ("b", 1320)))] * 2
    by_sharing = {sharing: CostModel(numbers, sharing).flops(group) for sharing in ("full", "vision", "none")}
    assert 6 * by_sharing["full"].prompt == by_sharing["vision"].prompt == by_sharing["none"].prompt
    assert 12 * by_sharing["full"].vision == 12 * by_sharing["vision"].vision == by_sharing["none"].vision
    assert 2 * by_sharing["full"].total < by_sharing["vision"].total < by_sharing["none"].total


def prompt(*tokens: int, images: tuple[tuple[str, tuple[int, int, int]], ...] = ()) -> EncodedPrompt:
    return EncodedPrompt(
        token_ids=np.array(tokens),
        compact_ids=tokens,
        image_starts=tuple(range(len(images))),
        grids=np.array([grid for _, grid in images], dtype=np.int64).reshape(-1, 3),
        image_keys=tuple(key for key, _ in images),
    )


def test_views_are_found_by_the_prompts_contents():
    first = prompt(1, 2, 3, images=(("a", (1, 4, 6)), ("b", (1, 2, 2))))
    equal = prompt(1, 2, 3, images=(("a", (1, 4, 6)), ("b", (1, 2, 2))))
    other_image = prompt(1, 2, 3, images=(("a", (1, 4, 6)), ("c", (1, 2, 2))))
    views = views_of([first, other_image, equal, prompt(4), first], [5, 6, 7, 8, 0])
    assert views == [
        ViewWork((0, 2, 4), 3, (5, 7, 0), (("a", 24), ("b", 4))),
        ViewWork((1,), 3, (6,), (("a", 24), ("c", 4))),
        ViewWork((3,), 1, (8,)),
    ]
    assert distinct_images(views) == {"a": 24, "b": 4, "c": 4}


def test_clusters_have_images_in_common_directly_or_through_others():
    images = [("a",), ("b", "c"), (), ("d",), ("c", "d"), (), ("a", "a")]
    views = [ViewWork((index,), 1, (1,), tuple((key, 4) for key in keys)) for index, keys in enumerate(images)]
    assert clusters(views) == [[0, 6], [1, 3, 4], [2], [5]]
    assert views[1].part([0]) == views[1]
