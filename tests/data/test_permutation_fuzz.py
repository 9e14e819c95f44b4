"""Texts that look like references, in any mixture: refused with a ``UserError``, or followed back and forth."""

import re
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from hypothesis import event, given, settings
from hypothesis import strategies as st

from perl_megatron.data.permutation import apply_order, invert, validate_contract
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, Grading, PermutationContract, Record, ReferenceRule

# fmt: off
FRAGMENTS = [
    "Image 1", "image 2", "image 10", "images 1-3", "images 1, 2", "picture #3", "<image 2>", "image_1", "Image2",
    "2 images", "the second image", "the last image", "first two images", "the first", "the third one",
    "second largest image", "left image", "the right one", "the image on the left", "left hand", "turn right",
    "middle image", "leftmost photo", "image A", "Image B", "figure (c)", "picture a", "images A and B", "image one",
    "image two", "in the image one dog", "(A)", "(B)", "(C)", "A.", "B)", "A", "B", "neither", "both", "none of these",
    "all of the above", "<image>", "the other image", "each image", "the previous image", "and", "or", "to", "than",
    "from", ",", ".", "?", ":", "\n", "-", "1", "2", "3, 1, 2", "3", "100%", "2.5", "the", "in", "of", "dog", "Which",
    "the first of the two images", "the last of", "of these pictures", "the image shown first", "first pair of images",
    "the second of", "the original image", "pair", "shown", "One image",
    "é", "İ", "①", "²", "٢", "\u200b", "\x00", "\ud7ff",
]
# fmt: on
PLAIN = [
    "Image 1",
    "image 2",
    "the second image",
    "images 1 and 2",
    "Image B",
    "the first photo",
    "<image 2>",
    "dog",
    "?",
    "(A) 1 (B) 2",
    "A. image 1\nB. image 2",
    "both",
    "and",
    ",",
    "the image on the left",
    "image two",
]  # fmt: skip
WILD = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=6)
TEXTS = st.one_of(WILD, st.lists(st.sampled_from(PLAIN), max_size=3)).map(" ".join)
ANSWERS = ["A", "B", "2", "2, 1", "left", "the second one", "image 2", "both", "Image B, image A", "1st"]


@st.composite
def records(draw) -> Record:
    num_images = draw(st.integers(2, 4))
    text = draw(TEXTS)
    text = "<image>" * max(num_images - text.count("<image>"), 0) + "\n" + text
    answer_rule = draw(st.sampled_from(list(AnswerRule)))
    option_slots = ()
    if answer_rule is AnswerRule.OPTION_LETTER:
        option_slots = tuple(draw(st.permutations([*range(num_images), None])))
    movable = draw(st.one_of(st.just(range(num_images)), st.lists(st.integers(0, num_images - 1), unique=True)))
    return Record(
        id="fuzzed",
        images=tuple(Path(f"{slot}.png") for slot in range(num_images)),
        text=text,
        answer=draw(st.one_of(st.sampled_from(ANSWERS), TEXTS)),
        grading=Grading(options=tuple(draw(st.lists(TEXTS, max_size=2)))),
        contract=PermutationContract(
            movable=() if answer_rule is AnswerRule.NOT_PERMUTABLE else tuple(movable),
            references=tuple(draw(st.lists(st.sampled_from(list(ReferenceRule)), unique=True))),
            answer=answer_rule,
            option_slots=option_slots,
        ),
    )


def neutral(text: str) -> str:
    """A text in which the last of n images is not told from the n-th, nor cases, nor digits of other scripts."""
    text = "".join(str(int(sign)) if sign.isdecimal() else sign for sign in text)
    for word, number in {"last": "Nth", "final": "Nth", "second": "Nth", "third": "Nth", "fourth": "Nth"}.items():
        text = text.replace(word, number)
    return text.casefold()


@settings(max_examples=200, deadline=None)
@given(records(), st.integers(0, 10**6))
def test_fuzzed_records_are_refused_or_follow(record, seed):
    try:
        validate_contract(record)
    except UserError:
        event("refused")
        return
    event("accepted")
    movable = list(record.contract.movable)
    if not record.contract.permutable:
        return
    event("permuted")
    order = list(range(len(record.images)))
    for slot, old in zip(movable, Random(seed).sample(movable, len(movable)), strict=True):
        order[slot] = old
    view = apply_order(record, order, 1)
    moved = replace(record, images=view.images, text=view.text, answer=view.answer, grading=view.grading)
    back = apply_order(moved, invert(order), 2)
    assert back.images == record.images
    assert neutral(back.text) == neutral(record.text)
    assert neutral(back.answer) == neutral(record.answer)
    assert [neutral(option) for option in back.grading.options] == [neutral(text) for text in record.grading.options]


ORDINALS = ["first", "second", "third", "last", "1st", "2nd"]
AFTER_ORDINALS = [
    "of",
    "among",
    "the",
    "these",
    "two",
    "3",
    "pair",
    "set",
    "shown",
    "given",
    "image",
    "pictures",
    "dog",
]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["the ", "", "a photo and the "]),
    st.sampled_from(ORDINALS),
    st.lists(st.sampled_from(AFTER_ORDINALS), max_size=4),
    st.sampled_from([" image", " images", " photos"]),
)
def test_an_ordinal_before_a_noun_for_images_follows_or_is_refused(article, ordinal, words, noun):
    text = f"<image><image><image>\nIs there a dog in {article}{' '.join([ordinal, *words])}{noun}?"
    images = tuple(Path(f"{slot}.png") for slot in range(3))
    record = Record("q", images, text, "yes", contract=PermutationContract((0, 1, 2), (ReferenceRule.ORDINAL,)))
    try:
        validate_contract(record)
    except UserError:
        event("refused")
        return
    event("accepted")
    moved = apply_order(record, (1, 2, 0), 1).text
    something_else = "dog" in words or words[:1] in (["the"], ["these"])  # "the first dog", "first the images turn"
    all_three = re.search(f"{ordinal} 3 (?:given |shown )?(?:image|photos|pictures)", text)
    assert moved != text or something_else or all_three


def test_long_texts_take_linear_time():
    def seconds(repeats: int) -> float:
        started = time.process_time()
        for piece in FRAGMENTS:
            record = Record(
                id="long",
                images=(Path("a.png"), Path("b.png")),
                text="<image><image>\n" + f"{piece} " * repeats,
                answer="A",
                contract=PermutationContract((0, 1), tuple(ReferenceRule)),
            )
            for contract in (record.contract, replace(record.contract, references=tuple(ReferenceRule)[:4])):
                try:
                    validate_contract(replace(record, contract=contract))
                except UserError:
                    continue
        return time.process_time() - started

    seconds(10)
    # Eight times the text; quadratic time would be 64 times as long.
    assert seconds(1200) < 30 * max(seconds(150), 0.02)
