import numpy as np
import pytest
import torch
from prompt_case import IMAGE_PAD, PIXELS, TEXT, prompt

from perl_megatron.model.mrope import position_ids
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.packed import lay_out_packed


def layout(sequences, *, indices=None, multiple=1, images=True):
    return lay_out_packed(
        sequences,
        range(len(sequences)) if indices is None else indices,
        length_multiple=multiple,
        pad_token_id=0,
        patches=PIXELS.__getitem__ if images else None,
        device=torch.device("cpu"),
    )


def answers(shared, *responses):
    return [TrainingSequence(shared, np.array(response, dtype=np.int64)) for response in responses]


def test_a_prompt_is_there_once_and_its_responses_without_their_last_tokens_behind_all_prompts():
    sequences = answers(prompt(), [11, 12, 13], [21]) + answers(prompt("small"), [31, 32])
    batch = layout(sequences, multiple=4)
    assert batch.token_ids.tolist() == [[TEXT, TEXT, IMAGE_PAD, TEXT, 11, 12, 31, 0]]
    assert batch.shared_prompts.prompt_lengths.tolist() == [1, 3]
    assert batch.shared_prompts.response_lengths.tolist() == [2, 1]
    assert batch.shared_prompts.prompt_of_response.tolist() == [0, 1]
    assert batch.shared_prompts.row_length == 8


def test_the_last_token_of_a_prompt_predicts_the_first_of_every_response():
    sequences = answers(prompt(), [11, 12, 13], [21]) + answers(prompt("small"), [31, 32])
    batch = layout(sequences)
    assert batch.output_places.tolist() == [0, 4, 5, 0, 3, 6]
    assert batch.targets.tolist() == [11, 12, 13, 21, 31, 32]
    assert (batch.lengths.tolist(), batch.num_tokens) == ([3, 1, 2], 6)


def test_values_keep_the_order_of_the_indices_where_views_are_interleaved():
    first, second = prompt(), prompt("small")
    sequences = [
        TrainingSequence(first, np.array([11, 12])),
        TrainingSequence(second, np.array([21])),
        TrainingSequence(first, np.array([31, 32, 33])),
    ]
    batch = layout(sequences, indices=[2, 1, 0])
    assert batch.indices == (2, 1, 0)
    assert batch.targets.tolist() == [31, 32, 33, 21, 11, 12]
    assert batch.token_ids.tolist() == [[TEXT, TEXT, IMAGE_PAD, TEXT, 31, 32, 11]]
    assert batch.output_places.tolist() == [0, 4, 5, 3, 0, 6]
    assert batch.places(np.array([100, 200, 300])).tolist() == [300, 301, 302, 200, 100, 101]


def test_positions_of_every_response_go_on_from_its_prompt():
    shared = prompt("wide", "small")
    length = len(shared.token_ids)
    batch = layout(answers(prompt(), [1, 2]) + answers(shared, [1, 2, 3, 4], [1, 2, 3]))
    positions, expected = batch.position_ids[:, 0].numpy(), position_ids(shared, 3)
    assert np.array_equal(positions[:, 1 : 1 + length], expected[:, :length])
    assert np.array_equal(positions[:, 2 + length : 5 + length], expected[:, length:])
    assert np.array_equal(positions[:, 5 + length :], expected[:, length : length + 2])


def test_an_image_is_encoded_once_for_all_views_and_goes_to_every_place():
    sequences = answers(prompt("small", "wide"), [1], [2]) + answers(prompt("wide", "small", "wide"), [3])
    batch = layout(sequences)
    assert batch.vision.grids.tolist() == [[1, 2, 2], [1, 2, 6]]
    assert batch.vision.feature_index.tolist() == [0, 1, 2, 3, 1, 2, 3, 0, 1, 2, 3]
    tokens = batch.token_ids.flatten()
    assert (tokens[batch.vision.image_places] == IMAGE_PAD).all()
    assert len(batch.vision.image_places) == int((tokens == IMAGE_PAD).sum())
    assert layout(sequences, images=False).vision is None


def test_an_image_token_in_a_response_is_text():
    batch = layout(answers(prompt("small"), [IMAGE_PAD, 5]))
    assert len(batch.vision.image_places) == 1


@pytest.mark.parametrize("sequences", [[], answers(prompt(), [])], ids=["nothing", "an empty response"])
def test_without_response_tokens_one_ignored_token_is_predicted(sequences):
    batch = layout(sequences, multiple=4)
    assert batch.token_ids.shape == (1, 4)
    assert (batch.output_places.tolist(), batch.targets.tolist(), batch.num_tokens) == ([0], [0], 0)
    assert batch.shared_prompts.num_padding == 3
