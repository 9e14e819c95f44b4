"""What the two stages ask a language model, and what they make of good and bad replies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.errors import UserError
from perl_megatron.preparation.label import Label, LabelReply
from perl_megatron.preparation.language_stage import Unusable, messages_of
from perl_megatron.preparation.prompts import FOLDER, mark_images, read_prompt, unmark_images
from perl_megatron.preparation.question import OrderLabel, Question
from perl_megatron.preparation.rephrase import Rephrase, RephrasedReply
from perl_megatron.preparation.settings import LabelSettings, RephraseSettings

QUESTION = Question(
    id="q",
    source="t:1",
    images=("images/a.png", "images/b.png"),
    image_sizes=((28, 28), (28, 28)),
    text="<image> and <image>: which is $5 ${cheaper}?",
    options=(),
    answer="the second one",
)
STAGE = Rephrase.of(RephraseSettings(), seed=0)


def reply(**changes: object) -> RephrasedReply:
    good = {
        "possible": True,
        "question": "[IMAGE 1] and [IMAGE 2]: which is cheaper?",
        "options": ["the first one", "the second  one", "both cost the same"],
        "answer": "The second one",
        "question_type": "ReferenceComparison",
    }
    return RephrasedReply(**{**good, **changes})  # type: ignore[arg-type]


def test_what_is_asked():
    system, user = messages_of(STAGE, QUESTION, Path("out"))
    (instructions,), (text,) = system.parts, user.parts
    assert isinstance(instructions, str)
    assert "between 2 and 6 texts" in instructions
    assert text == ("Question:\n[IMAGE 1] and [IMAGE 2]: which is $5 ${cheaper}?\n\nRight answer:\nthe second one")
    for key in RephrasedReply.model_fields:
        assert f'"{key}"' in instructions


def test_what_is_asked_with_images():
    stage = Rephrase.of(RephraseSettings(with_images=True), seed=0)
    parts = messages_of(stage, QUESTION, Path("out"))[1].parts
    assert parts[:5] == ("[IMAGE 1]: ", Path("out/images/a.png"), "\n", "[IMAGE 2]: ", Path("out/images/b.png"))


def test_a_good_reply():
    question = STAGE.judge(QUESTION, reply())
    assert question.text == "<image> and <image>: which is cheaper?"
    assert set(question.options) == {"the first one", "the second one", "both cost the same"}
    assert question.options[ord(question.answer) - ord("A")] == "the second one"
    assert question.question_type == "ReferenceComparison"
    assert (question.id, question.images) == (QUESTION.id, QUESTION.images)


def test_options_are_shuffled_by_seed_and_question():
    options = [str(number) for number in range(6)]
    judged = [
        Rephrase.of(RephraseSettings(), seed).judge(replace(QUESTION, id=name), reply(options=options, answer="0"))
        for seed in (0, 1)
        for name in "abcdefghij"
    ]
    assert len({question.options for question in judged}) > 10
    assert len({question.answer for question in judged}) > 3
    assert judged[0] == STAGE.judge(replace(QUESTION, id="a"), reply(options=options, answer="0"))


@pytest.mark.parametrize("last", ["none of these", "All of the above", "neither of them", "Both options."])
def test_options_about_the_others_stay_last(last):
    for name in "abcdefgh":
        question = STAGE.judge(replace(QUESTION, id=name), reply(options=[last, "red", "blue"], answer="red"))
        assert question.options[-1] == last


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"possible": False}, "finds no multiple-choice question"),
        ({"question": "Which is cheaper?"}, "images of the rephrased text"),
        ({"question": "[IMAGE 2] and [IMAGE 1]: which?"}, "images of the rephrased text"),
        ({"question": "[IMAGE 1] and [IMAGE 2]: is [IMAGE 2] cheaper?"}, "images of the rephrased text"),
        ({"question": "[IMAGE 1] and [IMAGE 2] and <image>"}, "images of the rephrased text"),
        ({"options": ["the second one"]}, "too few or too many options"),
        ({"options": [f"{k}" for k in range(6)] + ["the second one"]}, "too few or too many options"),
        ({"options": ["the second one", "The  second one"]}, "not distinct"),
        ({"options": ["the second one", " "]}, "not distinct"),
        ({"options": ["the second one", "[IMAGE 1]"]}, "an option shows an image"),
        ({"options": ["the second one", "size (C) of the cup"]}, "looks like other options"),
        ({"answer": "the third one"}, "none of the options"),
        ({"answer": ""}, "none of the options"),
    ],
)
def test_a_reply_that_is_no_use(changes, reason):
    with pytest.raises(Unusable, match=reason):
        STAGE.judge(QUESTION, reply(**changes))


def test_types_can_be_left_out():
    stage = Rephrase.of(RephraseSettings(keep_types=("ReferenceComparison",)), seed=0)
    assert stage.judge(QUESTION, reply()).question_type == "ReferenceComparison"
    with pytest.raises(Unusable, match="the question type is Other"):
        stage.judge(QUESTION, reply(question_type="Other"))


def test_only_open_questions_are_rephrased():
    assert STAGE.asks(QUESTION)
    assert not STAGE.asks(replace(QUESTION, options=("a", "b"), answer="A"))


def test_the_label():
    stage = Label.of(LabelSettings())
    question = replace(QUESTION, text="<image>\nWhich is like it?", options=("<image>", "neither"), answer="A")
    text = messages_of(stage, question, Path("out"))[1].parts[0]
    assert text == (
        "Question:\n[IMAGE 1]\nWhich is like it?\n\nOptions:\n(A) [IMAGE 2]\n(B) neither\n\nRight answer:\nA"
    )
    judged = stage.judge(question, LabelReply(should_change=True, is_multichoice_images=True))
    assert judged == replace(question, label=OrderLabel(should_change=True, is_multichoice_images=True))
    assert not stage.asks(replace(question, images=("images/a.png",), image_sizes=((28, 28),)))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text("ab [IMAGE1]<>\n"), min_size=1, max_size=5))
def test_images_are_marked_and_back(pieces):
    text = "<image>".join(pieces)
    num_images = text.count("<image>")
    marked = mark_images(text)
    if marked.count("[IMAGE ") == num_images:
        assert unmark_images(marked, num_images) == text
    with pytest.raises(ValueError, match="are"):
        unmark_images(marked, num_images + 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# System\nx\n# User\n${question}", "has to hold"),
        ("# System\nx\n# User\n${question} ${answer} ${other}", "has to hold"),
        ("# System\nx\n# User\n${question} ${answer} $ 5", "no other"),
        ("# User\n${question} ${answer}", "headings"),
        ("# System\nx\n# User\n${question} ${answer}\n# User\ny", "headings"),
        ("before\n", "headings"),
    ],
)
def test_a_prompt_that_cannot_be_used(tmp_path, text, problem):
    path = tmp_path / "prompt.md"
    path.write_text(text)
    with pytest.raises(UserError, match=problem) as caught:
        read_prompt("label", path, {"question", "answer"})
    assert str(path) in caught.value.where


def test_a_prompt_of_ones_own(tmp_path):
    path = tmp_path / "prompt.md"
    path.write_text("# System\nBe brief.\n# User\n${question} = ${answer}, $$5\n# not a heading of ours\n")
    prompt = read_prompt("label", path, {"question", "answer"})
    assert prompt.messages({"question": "q", "answer": "$a"})[1].parts == ("q = $a, $5\n# not a heading of ours",)


def test_prompts_are_files_of_the_package():
    assert sorted(path.name for path in FOLDER.iterdir()) == ["label.md", "rephrase.md"]
