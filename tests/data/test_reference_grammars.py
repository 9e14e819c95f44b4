"""What each grammar reads, leaves alone and refuses; test_references.py has the numbers and ordinals in digits."""

import time
from contextlib import suppress

import pytest

from perl_megatron.data.contract.references import find_references, refuse_relative, rewrite_references
from perl_megatron.errors import UserError
from perl_megatron.types import ReferenceRule

INDEX, ORDINAL, POSITION, LETTER = (ReferenceRule(name) for name in ("index", "ordinal", "position", "letter"))
ALL = (INDEX, ORDINAL, POSITION, LETTER)


def rotate(text: str, num_images: int, *rules: ReferenceRule) -> str:
    """Every image moves to the next slot, the last one to the first."""
    new_slots = [(slot + 1) % num_images for slot in range(num_images)]
    return rewrite_references(text, find_references(text, rules or ALL, num_images), new_slots)


@pytest.mark.parametrize(
    ("num_images", "text", "expected"),
    [
        (2, "The left image has more dogs than the right image.", "The right image has more dogs than the left image."),
        (2, "Both the left and right images show dogs.", "Both the right and left images show dogs."),
        (2, "the left or the right picture", "the right or the left picture"),
        (2, "The image on the left, the photo at right", "The image on the right, the photo at left"),
        (2, "the image that is shown on the left-hand side", "the image that is shown on the right-hand side"),
        (2, "the left-hand image, the RIGHT image", "the right-hand image, the LEFT image"),
        (2, "Leftmost photo", "Rightmost photo"),
        (2, "the image on the left or the right image", "the image on the right or the left image"),
        (2, "Is the left image bigger than the right one?", "Is the right image bigger than the left one?"),
        (2, "the left image has more dogs than the right.", "the right image has more dogs than the left."),
        (2, "more dogs in the left image than in the right", "more dogs in the right image than in the left"),
        (2, "a dog in the left image, and a cat in the right.", "a dog in the right image, and a cat in the left."),
        (2, "the left given image", "the right given image"),
        (2, "the image on the left given image", "the image on the right given image"),
        (2, "the first image on the left", "the second image on the right"),
        (2, "The dog in the left image faces right.", "The dog in the right image faces right."),
        (2, "In the image on the left, her left hand is up.", "In the image on the right, her left hand is up."),
        (3, "the left, middle and right images", "the middle, rightmost and leftmost images"),
        (3, "the leftmost image and the center image", "the middle image and the rightmost image"),
        (3, "the image on the far left", "the image in the middle"),
        (3, "a vase in the middle of the second image", "a vase in the middle of the third image"),
        (3, "Image A and image b. Figure (c)?", "Image B and image c. Figure (a)?"),
        (3, "images A, B and C; image_A", "images B, C and A; image_B"),
        (3, "Is image a or image c darker?", "Is image b or image a darker?"),
        (3, "In image one and image Two; image number three.", "In image two and image Three; image number one."),
        (3, "images one, two and three", "images two, three and one"),
        (3, "fig. 2, Fig.3, figs. 1 and 2, pics 1 & 3, img 2", "fig. 3, Fig.1, figs. 2 and 3, pics 2 & 1, img 3"),
        (3, "<image 1>, <image2>, [Image 3], Image-1, Image (2)", "<image 2>, <image3>, [Image 1], Image-2, Image (3)"),
        (3, "the second given image", "the third given image"),
        (3, "At first, the second image", "At first, the third image"),
        (12, "Image 1 … image 10, image 11, image 12", "Image 2 … image 11, image 12, image 1"),
        (21, "image twenty", "image 21"),
        (21, "the twentieth image", "the 21st image"),
    ],
)  # fmt: skip
def test_references_follow(num_images, text, expected):
    assert rotate(text, num_images) == expected


@pytest.mark.parametrize(
    "text",
    [
        "One image shows a dog, and the other image shows two cats.",
        "Both images, neither image, each image, all of the images, none of these",
        "She turns left; his right arm; the dog is looking to the right. How many are left?",
        "a right angle, a right-handed player, the right answer. Is the statement right?",
        "In the image two dogs and in these images three cats",
        "In this image I see a vitamin A pill (B)",
        "First of all, the images. First the image turns. The first of the dogs sleeps.",
        "It lies in the second half of the image.",
        "a first pair of shoes, the image is set second to none",
        "the second largest image, who is first in it",
        "the pictured scene, a figurine, images, imagery b",
    ],
)
def test_other_words_stay(text):
    assert find_references(text, ALL, 2) == []


@pytest.mark.parametrize(
    ("num_images", "text", "complaint"),
    [
        (2, "the dog on the left is bigger", "ambiguous"),
        (2, "the left side of the image", "ambiguous"),
        (2, "An image shows a dog on the left and a cat on the right.", "ambiguous"),
        (2, "the image to the left of the dog", "ambiguous"),
        (2, "The left image shows a dog; the one on the right sleeps.", "ambiguous"),
        (2, "Which of left and right is larger?", "ambiguous"),
        (2, "Who is in the image on the right side of the road?", "ambiguous"),
        (2, "the left images", "cannot follow"),
        (2, "the top image", "cannot follow"),
        (2, "the image at the bottom", "cannot follow"),
        (2, "the middle image", "does not name one of 2"),
        (1, "the left image", "does not name one of 1"),
        (3, "the left image", "does not name one of 3"),
        (4, "the middle image", "does not name one of 4"),
        (2, "the second image on the left", "cannot follow"),
        (2, "image C", "does not exist"),
        (3, "Picture a scene", "ambiguous"),
        (3, "Figure II", "cannot follow"),
        (3, "Does image one dog show?", "ambiguous"),
        (3, "image one and two", "ambiguous"),
        (3, "In the image (2)", "ambiguous"),
        (3, "the change from image 1 to 2", "ambiguous"),
        (3, "Is the first larger than the second?", "cannot follow"),
        (3, "the second image and the third", "cannot follow"),
        (3, "the first blurry image", "cannot follow"),
        (3, "the first of the two images", "cannot follow"),
        (3, "the last of these pictures", "cannot follow"),
        (3, "first of three images", "cannot follow"),
        (3, "the first of the blurry old images", "cannot follow"),
        (3, "the second of these", "cannot follow"),
        (3, "the first two of the images", "cannot follow"),
        (3, "the image shown first", "cannot follow"),
        (3, "the picture that comes last", "cannot follow"),
        (3, "the photo that was displayed second", "cannot follow"),
        (3, "the image that is first", "cannot follow"),
        (3, "the first pair of images", "cannot follow"),
        (3, "the second half of the images", "cannot follow"),
        (3, "the first row of images", "cannot follow"),
        (3, "the first image pair", "cannot follow"),
        (3, "the first set of two pictures", "cannot follow"),
        (3, "the first-shown image", "cannot follow"),
        (3, "the first's dog", "cannot follow"),
        (3, "image four", "does not exist"),
        (3, "image 99999999999999999999", "does not exist"),
        (3, "images 1-99999999999999999999", "does not exist"),
        (3, "the 99999999999999999999th image", "does not exist"),
        (3, "the first 99999999999999999999 images", "does not exist"),
        (2, "Image B: <image> Image A: <image>", "labels placeholder 1"),
        (2, "The right image: <image> The left image: <image>", "labels placeholder 1"),
    ],
)
def test_what_could_be_something_else_is_refused(num_images, text, complaint):
    with pytest.raises(UserError, match=complaint):
        find_references(text, ALL, num_images)


@pytest.mark.parametrize(
    "text",
    [
        *("the previous image", "Next picture", "the former", "the latter is", "the above image", "the earlier photo"),
        *("Later images", "the earlier of the images", "the initial image", "the original two images"),
        *("a reference image", "the query image", "the starting picture", "the other image"),
        *("Image 1 differs from the other given image", "One dog sleeps in the other image."),
        *("One of the dogs is in the other image", "the other image is one image"),
    ],
)
def test_neighbours_are_refused_where_images_move(text):
    with pytest.raises(UserError, match="cannot follow"):
        refuse_relative(text)
    refuse_relative(
        "the following images above and below, the next step, a latter day, the other images, an image source"
    )
    refuse_relative(
        "One image shows a dog, and the other image a cat. One of the two photos differs from the other one."
    )


def test_roles_may_be_those_of_images_that_stay():
    refuse_relative("Which is like the reference image?", all_move=False)
    with pytest.raises(UserError, match="cannot follow"):
        refuse_relative("Which is like the next image?", all_move=False)


def test_letters_may_be_those_of_options():
    references = find_references("image A and image C", (LETTER,), 4, letters=(2, None, 1))
    assert [reference.slots for reference in references] == [(2,), (1,)]
    assert rewrite_references("image A and image C", references, (0, 2, 1, 3)) == "image C and image A"
    with pytest.raises(UserError, match="does not exist"):
        find_references("image B", (LETTER,), 4, letters=(2, None, 1))


def test_sides_of_many_images_are_sets_of_one():
    (reference,) = find_references("the rightmost image", (POSITION,), 5)
    assert (reference.slots, reference.render) == ((4,), None)


@pytest.mark.parametrize(
    "labels",
    [
        "Here is the first image <image> and the second image <image>. ",
        "The first image is <image>, the second image is <image>. ",
        "<image 1>: <image>\n<image 2>: <image>\n",
        "Image A: <image>\nImage B: <image>\n",
        "Left: <image>\nRight: <image>\n",
        "The left image: <image> The right image: <image> ",
        "The first image:\n<image>\nThe second image:\n<image>\n",
        "Image one: <image>, image two: <image>. ",
    ],
)
def test_labels_stay_and_the_question_follows(labels):
    assert rotate(labels + "What is in the first image?", 2) == labels + "What is in the second image?"


def test_hostile_texts_take_linear_time():
    pieces = [
        "left ",
        "the image on the ",
        "first ",
        "image A, ",
        "image 1, ",
        "image one ",
        "(A) ",
        " ",
        "\n",
        "<image>",
    ]
    pieces += ["the right one ", "images ", "1-", "the ", "image" + " " * 50, "left or ", "and "]

    def seconds(repeats: int) -> float:
        started = time.process_time()
        for piece in pieces:
            with suppress(UserError):
                find_references(piece * repeats, ALL, 2)
        return time.process_time() - started

    seconds(100)
    # Ten times the text; quadratic time would be a hundred times as long.
    assert seconds(10000) < 40 * max(seconds(1000), 0.01)
