import numpy as np
import pytest
import torch

from perl_megatron.train.vision_input import ImageOccurrence, vision_input

GRIDS = {"large": (1, 4, 4), "small": (1, 2, 2), "also small": (1, 2, 2)}
PATCHES = {key: np.full((np.prod(grid), 1176), number, np.float32) for number, (key, grid) in enumerate(GRIDS.items())}


def occurrence(key, *places):
    return ImageOccurrence(key, np.array(GRIDS[key]), np.array(places))


def make(*occurrences, share=True):
    return vision_input(occurrences, PATCHES.__getitem__, torch.device("cpu"), share=share)


def test_an_image_that_occurs_again_is_encoded_once_and_goes_to_both_places():
    vision = make(occurrence("small", 3), occurrence("large", 5, 6, 7, 8), occurrence("small", 9))
    assert vision.grids.tolist() == [[1, 2, 2], [1, 4, 4]]
    assert vision.image_places.tolist() == [3, 5, 6, 7, 8, 9]
    assert vision.feature_index.tolist() == [0, 1, 2, 3, 4, 0]


def test_without_sharing_every_occurrence_is_encoded():
    vision = make(occurrence("small", 3), occurrence("small", 9), share=False)
    assert vision.grids.tolist() == [[1, 2, 2], [1, 2, 2]]
    assert vision.feature_index.tolist() == [0, 1]


def test_images_of_one_size_lie_together_in_the_order_in_which_they_came():
    vision = make(occurrence("also small", 1), occurrence("large", 2, 3, 4, 5), occurrence("small", 6))
    assert vision.patches[:, 0].tolist() == [2] * 4 + [1] * 4 + [0] * 16
    assert vision.feature_index.tolist() == [0, 2, 3, 4, 5, 1]


@pytest.mark.parametrize("share", [True, False])
def test_only_what_is_here_of_an_image_has_a_place(share):
    vision = make(occurrence("large", -1, -1, 0, 1), occurrence("small", -1), share=share)
    assert vision.grids.tolist() == [[1, 4, 4]]
    assert (vision.image_places.tolist(), vision.feature_index.tolist()) == ([0, 1], [2, 3])
    assert make(occurrence("small", -1), share=share) is None
