import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from perl_megatron.data.patches import PATCH_VALUES, Patches

SETTINGS = {
    "as published": {},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "its own mean": {"image_mean": [0.1, 0.2, 0.7], "image_std": [1.1, 0.3, 0.9]},
}
BOUNDS = {"size": {"shortest_edge": 784, "longest_edge": 10**7}}


def runs(processor, **options):
    def process(pixels: np.ndarray) -> np.ndarray:
        return processor(images=[Image.fromarray(pixels)], return_tensors="pt", **options)["pixel_values"].numpy()

    return process


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", [Qwen2VLImageProcessor, Qwen2VLImageProcessorPil])
def test_patches_are_those_of_the_image_processor_bit_for_bit(kind, options):
    processor = kind(**BOUNDS, **options)
    patches = Patches(runs(processor, do_resize=False))

    @given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
    @settings(deadline=None, max_examples=15)
    def holds(height, width, seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (28 * height, 28 * width, 3), dtype=np.uint8)
        found = patches(pixels)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, runs(processor)(pixels))

    holds()
    large = np.random.default_rng(0).integers(0, 256, (504, 532, 3), dtype=np.uint8)
    np.testing.assert_array_equal(patches(large), runs(processor)(large))


def test_an_image_processor_that_does_more_is_refused():
    process = runs(Qwen2VLImageProcessor(**BOUNDS), do_resize=False)

    def mixes_neighbours(pixels):
        return process(pixels // 2 + np.roll(pixels, 1, axis=1) // 2)

    def stretches_contrast(pixels):
        return process(pixels) / pixels.mean()

    def in_other_order(pixels):
        return process(pixels)[::-1]

    for wrong in (mixes_neighbours, stretches_contrast, in_other_order):
        with pytest.raises(ValueError, match="each colour value by itself"):
            Patches(wrong)
    with pytest.raises(ValueError, match=rf"\(4, 588\) numbers, not \(4, {PATCH_VALUES}\)"):
        Patches(lambda pixels: process(pixels)[:, :588])
