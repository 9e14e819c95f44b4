"""Bare numbers, letters and sides: what they answer decides whether they stay, follow, or stop a guess."""

from pathlib import Path

import pytest

from perl_megatron.data.contract.contract_templates import OrderLabel, apply_template, load_templates
from perl_megatron.types import AnswerRule, Record

TEMPLATES = load_templates()
CHANGES, SAME = OrderLabel(should_change=True), OrderLabel(should_change=False)


def contract(text: str, answer: str, *, images: int = 3, family: str = "mantis", label: OrderLabel | None = None):
    paths = tuple(Path(f"{slot}.png") for slot in range(images))
    question = Record("q1", paths, "<image>" * images + "\n" + text, answer)
    return apply_template(question, TEMPLATES, family=family, label=label).contract


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Which one does not belong with the others?", "3"),
        ("Which one does not belong with the others?", "three"),
        ("Which one is the odd one out?", "2"),
        ("Give the number of the odd one out.", "2"),
        ("At which index is the image with a cat?", "2"),
        ("At which index, counted from zero, is the cat?", "0"),
        ("What is the position of the image with a cat?", "2"),
        ("The cat is shown in picture number what?", "2"),
        ("What number is the odd one?", "1"),
        ("Consider how many dogs there are, and give the one with the most.", "2"),
        ("Look how many dogs there are. Which has the most?", "2"),
        ("Which one does not belong with the others? Compare with image 1.", "3"),
        ("Which one shows a dog? (A) 1 (B) 2 (C) 3", "B"),
        ("Which one shows a dog? (A) Only 1 (B) Only 2 (C) Both", "B"),
        ("Which one shows a dog? (A) One (B) Two (C) Three", "B"),
        ("Which one shows a dog? (A) #1 (B) #2 (C) 30", "B"),
        ("Which shows a dog?\n(A) B\n(B) C\n(C) A", "B"),
        ("Where is the dog? (A) both 1 and 2 (B) 1 and 3", "A"),
        ("Is it so?", "B"),
        # Quantities that look like the images' numbers.
        ("How many dogs are in image number 2?", "2"),
        ("How many dogs does which image show?\n(A) 1\n(B) 2", "A"),
        ("How many dogs does each show?", "2, 1"),
        # Words that look like images.
        ("Which way do the dogs look?", "left"),
        ("In what place did the dogs finish?", "the first"),
    ],
)
@pytest.mark.parametrize("label", [None, CHANGES, SAME])
def test_bare_answers_and_options_that_may_be_either_stop_a_guess(text, answer, label):
    given = contract(text, answer, label=label)
    assert given.answer is AnswerRule.NOT_PERMUTABLE
    if label is None:
        assert "may " in given.reason or "no template" in given.reason


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("How many dogs are there?", "2"),
        ("How many dogs are there in image 2?", "two"),
        ("What is the total number of dogs?", "3"),
        ("What is the number of the images in colour?", "3"),
        ("What is the difference between the numbers?", "0"),
        ("What number is shown in all images?", "1"),
        ("How many dogs are there? (A) 1 (B) 2 (C) 3", "B"),
        ("Calculate the sum.\n(A) 1\n(B) 2\nAnswer with the letter.", "B"),
        ("What is the number of the images in colour? (A) 1 (B) 2", "B"),
        ("In what year was this? (A) 1990 (B) 2000", "B"),
        ("In what year was this?", "1990"),
        ("Which flag is this? (A) X (B) Z", "B"),
    ],
)
def test_quantities_stay(text, answer):
    given = contract(text, answer)
    assert (given.answer, given.movable) == (AnswerRule.UNCHANGED, (0, 1, 2)), given.reason


def test_quantities_of_many_images_are_no_references():
    assert contract("How many dogs are there?", "12", images=12).answer is AnswerRule.UNCHANGED
    assert contract("Which images show dogs?", "11, 12", images=12).answer is AnswerRule.REFERENCES


@pytest.mark.parametrize(
    ("text", "answer", "family"),
    [
        ("One image shows a dog.", "True", "nlvr2"),
        ("Is there a dog? (A) yes (B) no", "A", "nlvr2"),
        ("Is there a dog in the first two images?", "yes", "mantis"),
    ],
)
def test_a_label_stops_what_nothing_follows(text, answer, family):
    assert contract(text, answer, images=2, family=family).permutable
    given = contract(text, answer, images=2, family=family, label=CHANGES)
    assert "by its label the answer changes" in given.reason
    assert contract("The left image shows a dog.", "True", images=2, family="nlvr2", label=CHANGES).permutable
