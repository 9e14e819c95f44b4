"""Contracts that contradict their record, beyond slots and numbers (those are in test_permutation.py)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from perl_megatron.data.permutation import apply_order, num_orders, validate_contract
from perl_megatron.data.records import read_records, write_records
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, Grading, PermutationContract, Record, ReferenceRule

INDEX, ORDINAL, POSITION, LETTER, OPTION_TEXT = ReferenceRule
KINDS = (INDEX, ORDINAL, POSITION, LETTER)


def record(text: str, answer: str, rule=AnswerRule.UNCHANGED, *, options=(), num_images: int = 2, **contract) -> Record:
    contract = {"movable": tuple(range(num_images)), "references": KINDS, "answer": rule} | contract
    missing = num_images - text.count("<image>")
    images = tuple(Path(f"{slot}.png") for slot in range(num_images))
    text = "<image>" * missing + "\n" + text
    return Record("q1", images, text, answer, contract=PermutationContract(**contract), grading=Grading(tuple(options)))


BY_LETTER = {"rule": AnswerRule.OPTION_LETTER, "num_images": 3, "movable": (1, 2), "option_slots": (1, 2)}
NAMES = AnswerRule.REFERENCES
FOUR = {"num_images": 4, "movable": (1, 2, 3), "option_slots": (1, 2, 3, None)}
SHOWN = "(A) <image> (B) <image>"
PAIRS = "Which pair shows the same animal? (A) <image> <image> (B) <image> <image>"


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (record("", "x", AnswerRule.NOT_PERMUTABLE), "lets slots"),
        (record("", "x", reason="because"), "gives a reason not to permute"),
        (record("", "image 1", NAMES, references=()), "needs the kinds of reference"),
        (record("", "the striped one", NAMES), "names none"),
        (record("", "image 3", NAMES), "does not exist"),
        (record("", "left", NAMES, references=(INDEX,)), "names none"),
        (record("", "left", NAMES, num_images=4), "does not name one of 4"),
        (record(SHOWN, "A"), "option A shows the image of slot 0, which moves"),
        (record(SHOWN, "(A)"), "option A shows the image of slot 0, which moves"),
        (record("Is A like B? " + SHOWN, "yes"), "option A shows the image of slot 0, which moves"),
        (record(PAIRS, "B", num_images=4), "option A shows the images of slots 0, 1, which move, but"),
        (record(PAIRS, "B", num_images=4, movable=(1, 2)), "option A shows the images of slots 0, 1"),
        (record(PAIRS, "B", NAMES, num_images=4), "option A shows the images of slots 0, 1"),
        (record(PAIRS, "2", AnswerRule.INDEX, num_images=4), "option A shows the images of slots 0, 1"),
        (record("Which? Pair A: <image> <image> Pair B: <image> <image>", "B", num_images=4), "option A shows"),
        (record(PAIRS, "A", AnswerRule.OPTION_LETTER, num_images=4, movable=(0, 2), option_slots=(0, 2)), "option A"),
        (record("<image> " + SHOWN, "A", NAMES, num_images=3), "option A shows the image of slot 1"),
        (record(SHOWN, "A", **BY_LETTER | {"option_slots": (2, 1)}), "but the contract gives slot 2"),
        (record(SHOWN, "A", **BY_LETTER | {"option_slots": (None, 1, 2)}), "says nothing of it"),
        (record("(A) image A (B) image 3", "A", **BY_LETTER | {"option_slots": (2, 1)}), "another image"),
        (record("Which? (A) 1 (B) 2 (C) both 1 and 2", "A", references=(OPTION_TEXT,)), "names none"),
        (record(SHOWN + " (C) <image> (D) both A and C", "D", **BY_LETTER | FOUR), "mentions option A, C"),
        (record(SHOWN + " (C) <image> (D) neither (A) nor (B)", "D", **BY_LETTER | FOUR), "mentions option A, B"),
        (record("Is option B the best?\n" + SHOWN, "A", **BY_LETTER), "mentions option B"),
        (record("Which? (A) 1 (B) 3", "A", references=(OPTION_TEXT,)), "does not exist"),
        (record("Which? (A) 1 (B) the big one", "A", references=(OPTION_TEXT,)), "names none"),
        (record("Which? 1 or 2", "A", references=(OPTION_TEXT,)), "lists no options"),
        (record("(A) image 1 (B) image 2", "A", options=("image 2", "image 1")), "other images in the text"),
        (record("(A) image 1 (B) neither", "A", options=("the right one", "neither")), "ambiguous|other images"),
        (record("Is image 1 the previous image?", "yes"), "cannot follow"),
        (record("the leftmost image", "yes", num_images=4), "others can move into"),
        (record("images A and B", "yes", num_images=27, references=(LETTER,)), "others can move into"),
    ],
)  # fmt: skip
def test_contradictory_records_are_refused_by_name(bad, complaint):
    with pytest.raises(UserError, match=complaint) as refused:
        validate_contract(bad)
    assert "record 'q1'" in str(refused.value)


def test_a_reason_not_to_permute_is_kept(tmp_path):
    for name in ("a", "b"):
        Image.new("L", (28, 28)).save(tmp_path / f"{name}.png")
    contract = PermutationContract(answer=AnswerRule.NOT_PERMUTABLE, reason="the images are a story")
    original = Record(
        "q1", (tmp_path / "a.png", tmp_path / "b.png"), "<image><image> the next image?", "A", contract=contract
    )
    assert (original.contract.permutable, num_orders(original)) == (False, 1)
    assert not replace(contract, movable=(0, 1)).permutable
    path = tmp_path / "train.jsonl"
    write_records(path, [original])
    (read,) = read_records(path, max_corrupt_fraction=0).records
    assert read.contract == contract
    line = json.loads(path.read_text())
    line["contract"]["movable"] = [0, 1]
    path.write_text(json.dumps(line))
    with pytest.raises(UserError, match="not permutable, but lets slots"):
        read_records(path, max_corrupt_fraction=0)


def test_new_rules_survive_the_file(tmp_path):
    for name in ("a", "b"):
        Image.new("L", (28, 28)).save(tmp_path / f"{name}.png")
    original = record("Which image? (A) left (B) right", "the left image", NAMES, references=(*KINDS, OPTION_TEXT))
    original = replace(original, images=(tmp_path / "a.png", tmp_path / "b.png"))
    write_records(tmp_path / "train.jsonl", [original])
    (read,) = read_records(tmp_path / "train.jsonl", max_corrupt_fraction=0).records
    assert read.contract == original.contract
    view = apply_order(read, (1, 0), 1)
    assert (view.text.splitlines()[1], view.answer) == ("Which image? (A) right (B) left", "the right image")


def test_options_that_stand_for_slots_are_graded_by_texts_that_stay():
    original = record(
        "Like image 1?\n(A) image 2 (B) image 3 (C) both image 2 and image 3",
        "A",
        **BY_LETTER | {"option_slots": (1, 2, None)},
        options=("image 2", "image 3", "both image 2 and image 3"),
    )
    validate_contract(original)
    view = apply_order(original, (0, 2, 1), 1)
    assert view.answer == "B"
    assert view.grading.options == ("image 2", "image 3", "both image 3 and image 2")
    assert view.text.endswith("(A) image 2 (B) image 3 (C) both image 3 and image 2")


def test_options_to_be_graded_by_follow_where_the_text_does_not_list_them():
    original = record("Which shows a dog?", "image 2", NAMES, options=("image 1", "image 2"))
    validate_contract(original)
    view = apply_order(original, (1, 0), 1)
    assert (view.answer, view.grading.options) == ("image 1", ("image 2", "image 1"))


def test_a_view_that_would_read_differently_is_refused():
    # "Image b dogs" can only be a letter; "image a dogs" may be an article.
    with pytest.raises(UserError, match=r"in the order \[1, 0\]: .* is ambiguous"):
        validate_contract(record("In image b dogs play.", "yes", references=(LETTER,)))
    # In the other order each number agrees with the placeholder behind it, and would be its label.
    with pytest.raises(UserError, match=r"in the order \[1, 0\] the text reads differently"):
        validate_contract(record("Compare image 2 <image> with image 1 <image>.", "yes", references=(INDEX,)))


def test_a_mention_of_all_options_that_are_images_stays():
    original = record(SHOWN + " (C) both A and B (D) A dog", "C", **BY_LETTER | {"option_slots": (1, 2, None, None)})
    validate_contract(original)
    assert apply_order(original, (0, 2, 1), 1).text == original.text


def test_images_in_options_follow_where_the_answer_names_them():
    by_letter = record("Which? " + SHOWN, "B", NAMES, references=(LETTER,))
    by_number = record("Which? <image> " + SHOWN, "2", AnswerRule.INDEX, num_images=3)
    fixed = record(PAIRS + "\nLike <image> or <image>?", "B", num_images=6, movable=(4, 5))
    for good, order, answer in (
        (by_letter, (1, 0), "A"),
        (by_number, (1, 0, 2), "1"),
        (fixed, (0, 1, 2, 3, 5, 4), "B"),
    ):
        validate_contract(good)
        assert apply_order(good, order, 1).answer == answer


def test_lists_of_letters_are_no_options():
    original = record("Image A: <image>\nImage B: <image>\nCompare figures (A) and (B).\n(A) one (B) two", "B")
    validate_contract(original)
    view = apply_order(original, (1, 0), 1)
    assert view.text.endswith("Compare figures (B) and (A).\n(A) one (B) two")
    assert view.answer == "B"
