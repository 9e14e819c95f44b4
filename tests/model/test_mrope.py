import numpy as np
import pytest
import torch
from tiny_policy import IMAGE_TOKEN, hf_config, tiny_sequences

from perl_megatron.model.mrope import position_ids
from perl_megatron.types import EncodedPrompt


@pytest.fixture(scope="module")
def rope_index():
    """transformers' positions, from a model without weights."""
    from transformers import Qwen2_5_VLModel

    with torch.device("meta"):
        model = Qwen2_5_VLModel(hf_config(tied=False))

    def compute(token_ids, grids):
        ids = torch.from_numpy(token_ids)[None]
        positions, _ = model.get_rope_index(
            ids, mm_token_type_ids=(ids == IMAGE_TOKEN).int(), image_grid_thw=torch.from_numpy(grids)
        )
        return positions[:, 0].numpy()

    return compute


@pytest.mark.parametrize("seed", range(3))
def test_equals_transformers(rope_index, seed):
    for sequence in tiny_sequences(seed):
        token_ids = np.concatenate([sequence.prompt.token_ids, sequence.response])
        ours = position_ids(sequence.prompt, len(sequence.response))
        assert ours.dtype == np.int64
        np.testing.assert_array_equal(ours, rope_index(token_ids, sequence.prompt.grids))


def test_an_image_token_in_the_response_is_text():
    sequence = tiny_sequences()[0]
    ours = position_ids(sequence.prompt, 3)
    assert (np.diff(ours[:, -4:], axis=1) == 1).all()


def test_final_position_does_not_depend_on_the_images_order():
    def last(grids):
        starts = np.cumsum([2, *(np.prod(grid) // 4 + 1 for grid in grids)])
        prompt = EncodedPrompt(np.zeros(starts[-1], dtype=np.int64), (), tuple(starts[:-1]), np.array(grids), ())
        return position_ids(prompt, 0)[:, -1].tolist()

    assert last([[1, 4, 6], [1, 10, 8], [1, 2, 2]]) == last([[1, 2, 2], [1, 4, 6], [1, 10, 8]])
