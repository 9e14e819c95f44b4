from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.data.permutation import apply_order, invert, num_orders, validate_contract
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, PermutationContract, Record, ReferenceRule

INDEX, ORDINAL = ReferenceRule.INDEX, ReferenceRule.ORDINAL
RULES = [AnswerRule.UNCHANGED, AnswerRule.OPTION_LETTER, AnswerRule.ORDERING, AnswerRule.INDEX]
ORDINALS = ["first", "second", "third", "fourth", "fifth"]
LITERALS = ["2 images", "7", "10 cats", "2.5", "the image is 28x28", "Why?", "3 of the images", "no. 4", "one", "IMAGE"]


@dataclass(frozen=True)
class Example:
    """A record with an independent description of what its text and answer say, for any order."""

    record: Record
    text: tuple[object, ...]
    """Literals; ('index', noun, slots) and ('ordinal', noun, slot) references."""
    meaning: object
    """The answer in terms of image identities (old slots)."""


def render(pieces: tuple[object, ...], place: tuple[int, ...]) -> str:
    """The text when the image of old slot s stands in ``place[s]``."""
    words = []
    for piece in pieces:
        if isinstance(piece, str):
            words.append(piece)
        elif piece[0] == "index":
            _, noun, slots = piece
            numbers = [str(place[slot] + 1) for slot in slots]
            words.append(
                noun
                + ("s " if len(slots) > 1 else " ")
                + (" and ".join([", ".join(numbers[:-1]), numbers[-1]][-min(2, len(slots)) :]))
            )
        else:
            words.append(f"the {ORDINALS[place[piece[2]]]} {piece[1]}")
    return " ; ".join(words)


@st.composite
def examples(draw) -> Example:
    num_images = draw(st.integers(1, 5))
    slots = st.integers(0, num_images - 1)
    movable = tuple(draw(st.permutations(range(num_images)))[: draw(st.integers(0, num_images))])
    nouns = st.sampled_from(["image", "Image", "picture", "figure"])
    references = st.one_of(
        st.tuples(st.just("index"), nouns, st.lists(slots, min_size=1, max_size=4)),
        st.tuples(st.just("ordinal"), nouns, slots),
    )
    pieces = draw(st.lists(st.one_of(st.sampled_from(LITERALS), references), max_size=6))
    rule = draw(st.sampled_from(RULES))
    option_slots: tuple[int | None, ...] = ()
    if rule is AnswerRule.OPTION_LETTER:
        pool = movable if movable and draw(st.booleans()) else tuple(set(range(num_images)) - set(movable))
        chosen = [*draw(st.permutations(pool)), *[None] * draw(st.integers(0, 2))] or [None]
        option_slots = tuple(draw(st.permutations(chosen)))
        letter = draw(st.integers(0, len(option_slots) - 1))
        answer, meaning = "ABCDEFG"[letter], option_slots[letter]
        options = [
            f"({'ABCDEFG'[i]}) " + ("none" if slot is None else f"image {slot + 1}")
            for i, slot in enumerate(option_slots)
        ]
        pieces = [*pieces, "\n".join(["Options", *options])]
        meaning = (letter, None) if option_slots[letter] is None else (None, option_slots[letter])
    elif rule is AnswerRule.ORDERING:
        meaning = tuple(draw(st.permutations(range(num_images)))[: draw(st.integers(1, num_images))])
        answer = draw(st.sampled_from([", ", ",", " ", " < "])).join(str(slot + 1) for slot in meaning)
    elif rule is AnswerRule.INDEX:
        meaning = draw(slots)
        answer = draw(st.sampled_from(["{}", "image {}", "Image {}."])).format(meaning + 1)
    else:
        meaning = answer = draw(st.sampled_from(["7", "image 1", "B", "a cat"]))
    pieces = ("<image>" * num_images + "\n", *pieces)
    record = Record(
        id="example",
        images=tuple(Path(f"{slot}.png") for slot in range(num_images)),
        text=render(pieces, tuple(range(num_images))),
        answer=answer,
        contract=PermutationContract(movable, (INDEX, ORDINAL), rule, option_slots),
    )
    return Example(record, pieces, meaning)


def orders(record: Record) -> list[tuple[int, ...]]:
    """All orders that leave the fixed slots alone."""
    num_images, movable = len(record.images), sorted(record.contract.movable)
    found = []
    for arrangement in permutations(movable):
        order = list(range(num_images))
        for slot, old in zip(movable, arrangement, strict=True):
            order[slot] = old
        found.append(tuple(order))
    return found


def meaning_of(record: Record, view) -> object:
    """The view's answer in terms of image identities, read off the view alone."""
    shown = [int(path.stem) for path in view.images]
    rule = record.contract.answer
    if rule is AnswerRule.OPTION_LETTER:
        letter = "ABCDEFG".index(view.answer)
        slot = record.contract.option_slots[letter]
        return (letter, None) if slot is None else (None, shown[slot])
    if rule is AnswerRule.ORDERING:
        return tuple(shown[int(number) - 1] for number in view.answer.replace(",", " ").replace("<", " ").split())
    if rule is AnswerRule.INDEX:
        return shown[int("".join(filter(str.isdigit, view.answer))) - 1]
    return view.answer


@settings(max_examples=60, deadline=None)
@given(examples())
def test_every_order_keeps_the_meaning_and_can_be_undone(example):
    record = example.record
    validate_contract(record)
    all_orders = orders(record)
    assert num_orders(record) == len(all_orders)
    for index, order in enumerate(all_orders):
        view = apply_order(record, order, index)
        assert view.images == tuple(record.images[old] for old in order)
        assert view.text == render(example.text, invert(order))
        assert meaning_of(record, view) == example.meaning
        assert (view.record_id, view.index, view.order) == (record.id, index, order)
        moved = replace(record, images=view.images, text=view.text, answer=view.answer)
        validate_contract(moved)
        back = apply_order(moved, invert(order), 0)
        assert (back.images, back.text, back.answer) == (record.images, record.text, record.answer)


def record(text: str, answer: str = "7", *, num_images: int = 3, rule=AnswerRule.UNCHANGED, **contract) -> Record:
    contract = {"movable": tuple(range(num_images)), "references": (INDEX, ORDINAL), "answer": rule} | contract
    images = tuple(Path(f"{slot}.png") for slot in range(num_images))
    return Record("q1", images, "<image>" * num_images + "\n" + text, answer, contract=PermutationContract(**contract))


def test_the_original_order_changes_no_character():
    original = record("The last image or images 1-3, Image 3", movable=(0, 1, 2))
    view = apply_order(original, (0, 1, 2), 0)
    assert (view.text, view.answer, view.permuted) == (original.text, original.answer, False)


def test_options_that_are_slots_stay_and_the_others_follow():
    options = "Which shows 7, image 1 or not?\n(A) image 1 (B) image 2\n(C) both image 1 and image 2"
    original = record(options, "A", num_images=2, rule=AnswerRule.OPTION_LETTER, option_slots=(0, 1, None))
    validate_contract(original)
    view = apply_order(original, (1, 0), 1)
    expected = "Which shows 7, image 2 or not?\n(A) image 1 (B) image 2\n(C) both image 2 and image 1"
    assert (view.text, view.answer) == ("<image><image>\n" + expected, "B")


def test_options_that_follow_keep_their_letter():
    original = record("Which shows 7?\nA. image 1\nB. image 2", "A", num_images=2)
    view = apply_order(original, (1, 0), 1)
    assert view.text.endswith("A. image 2\nB. image 1")
    assert view.answer == "A"


def test_fixed_slots_stay():
    original = record("Which is like image 1, B. or so?\nA. <image>\nB. <image>\nAnswer with image 1 in mind.", "B")
    original = replace(
        original,
        text=original.text.removeprefix("<image><image>"),
        contract=PermutationContract((1, 2), (INDEX,), AnswerRule.OPTION_LETTER, (1, 2)),
    )
    validate_contract(original)
    view = apply_order(original, (0, 2, 1), 1)
    assert (view.text, view.answer, [path.name for path in view.images]) == (
        original.text,
        "A",
        ["0.png", "2.png", "1.png"],
    )
    assert num_orders(original) == 2


LETTER = {"rule": AnswerRule.OPTION_LETTER}


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (record("<image>"), "4 <image> placeholders for 3 images"),
        (record("", movable=(0, 3)), "not all among the slots"),
        (record("", movable=(0, -1)), "not all among the slots"),
        (record("", movable=(0, 1, 0)), "name a slot twice"),
        (record("image 4"), "does not exist"),
        (record("the fourth image", movable=()), "does not exist"),
        (record("images 1-2"), "others can move into"),
        (record("the first two images"), "others can move into"),
        (record("", "A", option_slots=(0, 1, 2)), "answer rule is 'unchanged'"),
        (record("", "D", option_slots=(0, 1, 2), **LETTER), "not one of the letters"),
        (record("", "a", option_slots=(0, 1, 2), **LETTER), "not one of the letters"),
        (record("", "(A)", option_slots=(0, 1, 2), **LETTER), "not one of the letters"),
        (record("", "", option_slots=(0, 1, 2), **LETTER), "not one of the letters"),
        (record("", "A", **LETTER), "needs 1 to 26"),
        (record("", "A", option_slots=(0, 0, 1, 2), **LETTER), "name a slot twice"),
        (record("", "A", option_slots=(0, 1, 3), **LETTER), "does not exist"),
        (record("", "A", option_slots=(0, 1), **LETTER), "mix images"),
        (record("(A) image 2 (B) image 1", "A", option_slots=(0, 1), movable=(0, 1), **LETTER), "names another image"),
        (record("A image 1 B image 2", "A", option_slots=(0, 1), movable=(0, 1), **LETTER), "cannot tell the options"),
        (record("", "1, 4", rule=AnswerRule.ORDERING), "does not exist"),
        (record("", "0, 1", rule=AnswerRule.ORDERING), "does not exist"),
        (record("", "1, 2, 1", rule=AnswerRule.ORDERING), "names an image twice"),
        (record("", "1 then 2", rule=AnswerRule.ORDERING), "not a list of image numbers"),
        (record("", "", rule=AnswerRule.ORDERING), "not a list of image numbers"),
        (record("", "4", rule=AnswerRule.INDEX), "does not exist"),
        (record("", "1, 2", rule=AnswerRule.INDEX), "not one image number"),
        (record("", "cat", rule=AnswerRule.INDEX), "not one image number"),
    ],
)
def test_contradictory_records_are_refused_by_name(bad, complaint):
    with pytest.raises(UserError, match=complaint) as refused:
        validate_contract(bad)
    assert "q1" in str(refused.value)
    with pytest.raises(UserError, match=r"train\.jsonl:7"):
        validate_contract(replace(bad, source="train.jsonl:7"))


def test_orders_of_fixed_slots_are_an_invariant():
    with pytest.raises(AssertionError):
        apply_order(record("", movable=(0, 1)), (2, 1, 0), 1)
    with pytest.raises(AssertionError):
        apply_order(record(""), (0, 0, 1), 1)
