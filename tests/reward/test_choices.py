"""Options named by letter, by text, by image, and by two of these at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.reward.choices import read_option

OPTIONS = ("one cat", "Two dogs", "a bird", "a  Bird", "$\\frac{1}{2}$")
SLOTS = (None, 2, 0, 1)


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", 1),
        ("(b)", 1),
        ("Option B", 1),
        ("two dogs", 1),
        ("  TWO  dogs. ", 1),
        ("\\text{two dogs}", 1),
        ("B. two dogs", 1),
        ("(B) two dogs", 1),
        ("B) two dogs", 1),
        ("b: two dogs", 1),
        ("B - two dogs", 1),
        ("B (two dogs)", None),  # no mark after the letter
        ("B. (two dogs)", 1),
        ("Option (B): two dogs", 1),
        ("\\frac{1}{2}", 4),
        ("C. a bird", 2),
        ("D. a bird", 3),
        ("a bird", None),  # two options have this text
        ("A. two dogs", None),  # they disagree
        ("B. three dogs", None),
        ("A or B", None),
        ("A. or B.", None),
        ("A) or B)", None),
        ("two dogs or one cat", None),
        ("", None),
        (".", None),
        ("three", None),
    ],
)
def test_letters_and_texts(answer, option):
    assert read_option(answer, options=OPTIONS) == option


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("image 2", 3),
        ("Image #2", 3),
        ("the second image", 3),
        ("2nd picture", 3),
        ("The first image.", 2),
        ("the last image", 1),
        ("D. image 2", 3),
        ("(B) the third image", 1),
        ("B. image 2", None),
        ("image 4", None),
        ("image 0", None),
        ("the fourth image", None),
        ("the last but one image", None),
        ("image 1 or 2", None),
        ("2", None),  # a bare number is no image
        ("second", None),
    ],
)
def test_images(answer, option):
    assert read_option(answer, option_slots=SLOTS, num_images=3) == option


def test_text_that_names_the_image_of_its_own_option_agrees():
    options, slots = ("Image 2", "Image 1"), (1, 0)
    assert read_option("image 1", options=options, option_slots=slots) == 1
    # A text that names another option's image is ambiguous.
    assert read_option("image 1", options=("Image 1", "Image 2"), option_slots=slots) is None


def test_a_letter_alone_is_a_letter_whatever_the_options_say():
    assert read_option("A", options=("B", "A")) == 0
    assert read_option("A. B", options=("B", "A")) == 0


@given(
    st.lists(st.sampled_from([*"ABCD().: -", "two dogs", "image 2", "or", "\\text{", "}"]), max_size=12).map("".join)
)
@settings(deadline=None, max_examples=200)
def test_at_most_one_option_is_named(answer):
    option = read_option(answer, options=OPTIONS, option_slots=SLOTS, num_images=3)
    assert option is None or 0 <= option < 26
