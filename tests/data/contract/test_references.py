import pytest

from perl_megatron.data.contract.references import find_references, rewrite_references
from perl_megatron.errors import UserError
from perl_megatron.types import ReferenceRule

INDEX, ORDINAL = ReferenceRule.INDEX, ReferenceRule.ORDINAL


def rotate(text: str, *rules: ReferenceRule, num_images: int = 12) -> str:
    """Every image moves to the next slot, the last one to the first."""
    new_slots = [(slot + 1) % num_images for slot in range(num_images)]
    return rewrite_references(text, find_references(text, rules or (INDEX, ORDINAL), num_images), new_slots)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is in image 2?", "What is in image 3?"),
        ("Image 1 and Image 10, image 11.", "Image 2 and Image 11, image 12."),
        ("image 12", "image 1"),
        ("Images 1 and 3", "Images 2 and 4"),
        ("images 1, 2 and 4?", "images 2, 3 and 5?"),
        ("images 1, 2, or 4", "images 2, 3, or 5"),
        ("images 1 and 2 and 3", "images 2 and 3 and 4"),
        ("pictures #3 & #4, photo no. 5", "pictures #4 & #5, photo no. 6"),
        ("picture 2, figure 3, photograph 4, IMAGE 5", "picture 3, figure 4, photograph 5, IMAGE 6"),
        ("(image1) [image-2] image_3", "(image2) [image-3] image_4"),
        ("from image 1 to image 3", "from image 2 to image 4"),
        ("In image 1, 3 dogs run", "In image 2, 3 dogs run"),
        ("In images 1 and 2, 3 dogs run", "In images 2 and 3, 3 dogs run"),
        ("image 2 of 3", "image 3 of 3"),
        ("image 1 and 20 cats", "image 2 and 20 cats"),
        ("Is image 3's digit 3?", "Is image 4's digit 3?"),
    ],
)
def test_index_references_follow(text, expected):
    assert rotate(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "2 images and 7, image",
        "1 image 2.5 wide",
        "image 28x28, image 2nd, image 2a, image 5%",
        "subimage 2, images2d, imagery 2",
        "List the parts of the image\n1. head\n2. tail",
        "the first time, in second place",
        "first imagery, thirteenthimage",
    ],
)
def test_other_numbers_and_words_stay(text):
    assert find_references(text, (INDEX, ORDINAL), 12) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the second image", "the third image"),
        ("The First picture, THE FIRST IMAGE", "The Second picture, THE SECOND IMAGE"),
        ("the 1st, 2nd and 11th images", "the 2nd, 3rd and 12th images"),
        ("the first and the third image", "the second and the fourth image"),
        ("the last image", "the first image"),
        ("Last photo", "First photo"),
        ("from the first to the second image", "from the second to the third image"),
        ("eleventh\nimage", "twelfth\nimage"),
    ],
)
def test_ordinals_follow(text, expected):
    assert rotate(text) == expected


def test_numerals_have_their_suffixes():
    text = "the 1st, 2nd, 3rd, 10th, 11th, 12th, 20th, 21st, 22nd images"
    assert rotate(text, num_images=23) == "the 2nd, 3rd, 4th, 11th, 12th, 13th, 21st, 22nd, 23rd images"
    assert rotate("the twentieth image", num_images=23) == "the 21st image"


def test_only_the_declared_kinds_follow():
    text = "image 2 and the second image"
    assert rotate(text, INDEX) == "image 3 and the second image"
    assert rotate(text, ORDINAL) == "image 2 and the third image"
    assert find_references(text, (), 12) == []


def test_last_is_the_last_of_the_record():
    assert rotate("the last image", num_images=3) == "the first image"
    references = find_references("the last image", (ORDINAL,), 3)
    assert rewrite_references("the last image", references, (1, 0, 2)) == "the last image"
    assert rewrite_references("the last image", references, (2, 0, 1)) == "the second image"


@pytest.mark.parametrize(
    "text",
    [
        "Image 1: <image>\nImage 2: <image>\n",
        "Here they are. Image 1 : <image>, image 2:<image> ",
        "Image 1\n<image>\nImage 2\n<image>\n",
        "image 1: <image> Image 2 <image>",
        "First image: <image> Second image: <image> ",
        "Images 1 and 2: <image><image>",
        "Images 1-2: <image><image>",
    ],
)
def test_labels_of_placeholders_stay(text):
    question = text + "What is in image 1?"
    assert rotate(question, num_images=2) == text + "What is in image 2?"


def test_a_question_before_the_images_is_not_a_label():
    assert rotate("What is in image 1?\n<image><image>", num_images=2) == "What is in image 2?\n<image><image>"
    assert rotate("Find the digit of image 1 <image><image>", num_images=2).startswith("Find the digit of image 2 ")


def test_sets_stay():
    text = "images 1-3 and images 1 to 3, image 4 and 5 more; the first three images, the last 2 images"
    references = find_references(text, (INDEX, ORDINAL), 4)
    assert [reference.slots for reference in references] == [(0, 1, 2), (0, 1, 2), (3,), (0, 1, 2), (2, 3)]
    assert rewrite_references(text, references, (2, 0, 1, 3)) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("image 0", "does not exist"),
        ("image 4", "does not exist"),
        ("images 1, 2 and 4", "does not exist"),
        ("images 2-4", "does not exist"),
        ("images 3-1", "does not exist"),
        ("the fourth image", "does not exist"),
        ("the first four images", "does not exist"),
        ("the last four images", "does not exist"),
        ("image 1 or 3", "ambiguous"),
        ("image 1/2", "ambiguous"),
        ("the second to last image", "cannot follow"),
        ("the second-to-last image", "cannot follow"),
        ("the second last image", "cannot follow"),
        ("the penultimate picture", "cannot follow"),
        ("compare the first image with the second one", "cannot follow"),
        ("the second two images", "cannot follow"),
        ("Image 2: <image> Image 1: <image><image>", "labels placeholder 1"),
        ("<image> Image 1\n<image> Image 2\n<image>", "labels placeholder 2"),
    ],
)
def test_what_cannot_be_followed_is_refused(text, complaint):
    with pytest.raises(UserError, match=complaint):
        find_references(text, (INDEX, ORDINAL), 3)


def test_long_texts_do_not_stall():
    text = "image 1, " * 2000 + " " * 20000 + "first and " * 500 + "images 1" + ", 2" * 5000 + "<image>" * 100
    assert len(find_references(text, (INDEX, ORDINAL), 2)) == 2000 + 5001
