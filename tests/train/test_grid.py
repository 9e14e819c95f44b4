import numpy as np
import torch
from prompt_case import IMAGE_PAD, PIXELS, TEXT, prompt

from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.grid import lay_out_rows


def layout(sequences, *, multiple=1, images=True, context=(0, 1)):
    return lay_out_rows(
        sequences,
        range(len(sequences)),
        length_multiple=multiple,
        pad_token_id=0,
        patches=PIXELS.__getitem__ if images else None,
        device=torch.device("cpu"),
        context=context,
    )


def test_rows_are_padded_to_the_longest_and_to_the_multiple():
    sequences = [TrainingSequence(prompt(), np.array([1, 2])), TrainingSequence(prompt("wide"), np.array([1]))]
    assert layout(sequences[:1]).token_ids.shape == (1, 3)
    assert layout(sequences).token_ids.tolist()[0] == [TEXT, 1, 2, 0, 0, 0]
    assert layout(sequences, multiple=4).token_ids.shape == (2, 8)


def test_outputs_are_the_positions_that_predict_the_response():
    sequences = [
        TrainingSequence(prompt("small"), np.array([11, 12, 13])),
        TrainingSequence(prompt(), np.array([21])),
        TrainingSequence(prompt("wide", "small"), np.array([31, 32])),
    ]
    batch = layout(sequences)
    assert batch.targets.tolist() == [11, 12, 13, 21, 31, 32]
    shifted = torch.roll(batch.token_ids, -1, dims=1)
    assert shifted.flatten()[batch.output_places].tolist() == batch.targets.tolist()
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.num_tokens == 6


def test_an_image_token_in_a_response_is_text():
    batch = layout([TrainingSequence(prompt("small"), np.array([IMAGE_PAD, 5]))])
    assert batch.vision is not None
    assert len(batch.vision.image_places) == 1
    assert batch.targets.tolist() == [IMAGE_PAD, 5]


def test_equal_images_are_laid_out_once_and_found_from_every_row():
    batch = layout(
        [
            TrainingSequence(prompt("small", "wide"), np.array([1])),
            TrainingSequence(prompt("wide", "small"), np.array([1])),
            TrainingSequence(prompt("wide", "wide"), np.array([1])),
        ]
    )
    vision = batch.vision
    assert vision is not None
    assert vision.grids.tolist() == [[1, 2, 2], [1, 2, 6]]
    assert vision.patches.shape == (4 + 12, 1176)
    assert vision.feature_index.tolist() == [0, 1, 2, 3, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3]
    assert (batch.token_ids.flatten()[vision.image_places] == IMAGE_PAD).all()
    assert len(vision.image_places) == len(vision.feature_index)


def test_no_images_and_left_out_images_give_no_vision_input():
    assert layout([TrainingSequence(prompt(), np.array([1]))]).vision is None
    assert layout([TrainingSequence(prompt("small"), np.array([1]))], images=False).vision is None


def test_a_prompt_shared_by_responses_of_different_length_keeps_its_positions():
    shared = prompt("wide")
    together = layout([TrainingSequence(shared, np.array([1])), TrainingSequence(shared, np.array([1, 2, 3]))])
    alone = layout([TrainingSequence(shared, np.array([1]))])
    assert torch.equal(together.position_ids[:, :1, :6], alone.position_ids)
    assert torch.equal(together.position_ids[:, 1, :6], alone.position_ids[:, 0])
    assert together.position_ids[:, 1, 6:].tolist() == [[6, 7]] * 3
    assert together.position_ids[:, 0, 6:].tolist() == [[0, 0]] * 3


def test_a_filler_batch_predicts_one_ignored_token():
    batch = layout([], multiple=4)
    assert batch.token_ids.tolist() == [[0, 0, 0, 0]]
    assert (len(batch.output_places), len(batch.targets), batch.num_tokens, batch.indices) == (1, 1, 0, ())


def test_context_ranks_share_the_tokens_and_need_only_their_own_images():
    sequences = [
        TrainingSequence(prompt("wide", "small"), np.arange(11, 20)),
        TrainingSequence(prompt("small"), np.array([21, 22])),
        TrainingSequence(prompt(), np.array([31])),
    ]
    whole = layout(sequences, multiple=4)
    parts = [layout(sequences, multiple=4, context=(rank, 2)) for rank in range(2)]
    starts = np.array([100, 200, 300])
    assert whole.own_tokens.tolist() == list(range(12))
    assert whole.places(starts).tolist() == [*range(100, 109), 200, 201, 300]
    tokens = np.zeros(12, dtype=np.int64)
    for batch in parts:
        assert batch.token_ids.shape == (3, whole.token_ids.shape[1] // 2)
        assert batch.num_tokens == len(batch.targets) == len(batch.output_places)
        tokens[batch.own_tokens] += batch.targets.numpy()
        assert batch.vision is not None
        assert (batch.token_ids.flatten()[batch.vision.image_places] == IMAGE_PAD).all()
        assert len(batch.vision.image_places) == len(batch.vision.feature_index)
        assert int((batch.token_ids == IMAGE_PAD).sum()) == len(batch.vision.feature_index)
    assert tokens.tolist() == whole.targets.tolist()
    # 16 positions: rank 0 has 0-3 and 12-15, rank 1 the rest; the wide image takes 1-3, the small one 5 (and 1).
    first, second = (batch.vision for batch in parts)
    assert first.grids.tolist() == [[1, 2, 2], [1, 2, 6]]
    assert first.feature_index.tolist() == [1, 2, 3, 0]
    assert second.grids.tolist() == [[1, 2, 2]]
    assert second.feature_index.tolist() == [0]


def test_a_context_rank_without_response_tokens_predicts_an_ignored_one():
    batch = layout([TrainingSequence(prompt("wide"), np.array([1]))], multiple=4, context=(0, 2))
    assert (batch.num_tokens, len(batch.targets), len(batch.output_places)) == (0, 1, 1)
    other = layout([TrainingSequence(prompt("wide"), np.array([1]))], multiple=4, context=(1, 2))
    assert (other.num_tokens, other.targets.tolist()) == (1, [1])
