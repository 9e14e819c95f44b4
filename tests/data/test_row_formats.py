import copy
from contextlib import suppress

import foreign_rows
import pytest
from foreign_rows import EASYR1, MANTIS, MMK12, PLAIN, VERL, png
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.data.row_formats import FORMATS, Draft, detect_format
from perl_megatron.errors import UserError

GOOD = {"mantis": MANTIS, "mmk12": MMK12, "verl": VERL, "easyr1": EASYR1, "jsonl": PLAIN}


def changed(row: dict, **changes) -> dict:
    return {key: value for key, value in (copy.deepcopy(row) | changes).items() if value is not ...}


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_mantis_rows_have_a_question_for_each_pair_of_turns():
    first, second = FORMATS["mantis"](MANTIS[0])
    both = (png(1), png(2))
    assert first == Draft("nlvr2_1", both, "<image> <image>\nIs it true? (A) True (B) False", "B", "nlvr2")
    assert second == Draft("nlvr2_1#2", both, "<image><image>\nHow many dogs are there?", "3", "nlvr2")
    assert FORMATS["mantis"](MANTIS[1]) == [Draft("iconqa_7", (png(3),), "<image>\nWhat is it?", "A cat.", "iconqa")]


def test_mantis_questions_see_the_images_up_to_their_turn():
    images = [foreign_rows.embedded(shade) for shade in range(4)]
    row = {"images": images, "conversation": turns("x <image>", "1", "y <image> z <image>", "2", "end", "3")}
    texts = [(draft.text, len(draft.images)) for draft in FORMATS["mantis"](row)]
    assert texts == [
        ("<image>\nx <image>", 2),
        ("<image><image>\ny <image> z <image>", 4),
        ("<image><image><image><image>\nend", 4),
    ]


def test_mantis_conversations_may_have_the_other_names():
    other = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "7"}]
    for row in ({"conversations": other}, {"conversation": None, "conversations": other}):
        (draft,) = FORMATS["mantis"]({"id": "x", "images": [], **row})
        assert (draft.text, draft.answer) == ("?", "7")


def test_the_other_formats():
    assert FORMATS["mmk12"](MMK12[0]) == [
        Draft("17", (png(4),), "<image>\nFind the area.", "$\\frac{3}{4}$", "", "math")
    ]
    assert FORMATS["verl"](VERL[0]) == [
        Draft(
            "geometry3k-train-3",
            (png(5), png(6)),
            "<image><image>How many degrees?",
            "48",
            "hiyouga/geometry3k",
            "math",
        )
    ]
    assert FORMATS["easyr1"](EASYR1[0]) == [Draft(None, (png(7),), "<image>Which one?", "2.5")]
    assert FORMATS["jsonl"](PLAIN[0]) == [
        Draft(
            "p1",
            ("scans/a.png", "scans/b.png"),
            "<image><image>\nWhich?\n(A) the cat\n(B) the dog",
            "the cat",
            "pets",
            "animals",
        )
    ]
    assert FORMATS["jsonl"](PLAIN[1]) == [Draft("p2", ("scans/a.png",), "<image> How many?", "4")]


def test_images_and_chats_in_other_forms():
    row = changed(VERL[0], prompt="<image>?", images=[{"image": "file:///x/y.png"}])
    assert FORMATS["verl"](row)[0].images == ("/x/y.png",)
    parts = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    row = changed(VERL[0], prompt=[{"role": "user", "content": parts}], images=["data:image/png;base64,iVBORw=="])
    draft = FORMATS["verl"](row)[0]
    assert (draft.text, draft.images) == ("<image>Which?", (b"\x89PNG",))


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("mantis", changed(MANTIS[0], conversation=...), "conversation is no list"),
        ("mantis", changed(MANTIS[0], conversation=turns("?")), "no answer of an assistant"),
        ("mantis", changed(MANTIS[0], conversation=turns("?", "<image>")), "an answer holds <image>"),
        ("mantis", changed(MANTIS[0], conversation=[7]), "no object with role"),
        ("mantis", changed(MANTIS[1], conversation=turns("<image><image>", "1")), "more <image> placeholders"),
        ("mantis", changed(MANTIS[0], images=[{"bytes": None, "path": None}]), "neither bytes nor a path"),
        ("mmk12", changed(MMK12[0], answer=None), "no answer"),
        ("mmk12", changed(MMK12[0], answer=" "), "answer is empty"),
        ("mmk12", changed(MMK12[0], question=["a", "b"]), "question is no text"),
        ("mmk12", changed(MMK12[0], image=None), "1 <image> placeholders for 0 images"),
        ("verl", changed(VERL[0], reward_model=None), "reward_model"),
        ("verl", changed(VERL[0], reward_model={"ground_truth": {"a": 1}}), "ground_truth is no text"),
        ("easyr1", changed(EASYR1[0], images=[7]), "neither bytes nor a path"),
        ("easyr1", changed(EASYR1[0], images=["data:image/png;base64,?"]), "data URL is corrupt"),
        ("easyr1", changed(EASYR1[0], images=["data:image/png;base64,é"]), "data URL is corrupt"),
        ("jsonl", changed(PLAIN[0], options="A"), "options is no list"),
        ("jsonl", changed(PLAIN[0], answer="x" * 200_000), "more than 100000 characters"),
    ],
)
def test_bad_rows_are_refused(format, row, reason):
    with pytest.raises(UserError, match=reason):
        FORMATS[format](row)


def test_formats_are_known_by_their_columns():
    for format, rows in GOOD.items():
        assert detect_format(list(rows[0]), where="x") == format
    assert detect_format(["id", "images", "text", "answer", "contract"], where="x") == "records"
    for unclear in (["a"], ["question", "problem", "answer"], ["id", "images", "text", "answer"]):
        with pytest.raises(UserError, match="--format"):
            detect_format(unclear, where="x")


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "bytes", "path", "from", "value", "type", "text"]), inner, max_size=3),  # noqa: E501
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_no_row_raises_anything_but_user_errors(format, data):
    row = copy.deepcopy(data.draw(st.sampled_from(GOOD[format])))
    for column in data.draw(st.lists(st.sampled_from([*row, "extra_info", "id"]), max_size=3)):
        row[column] = data.draw(JUNK)
    drafts = []
    with suppress(UserError):
        drafts = FORMATS[format](row)
    assert all(draft.text.count("<image>") == len(draft.images) for draft in drafts)
    assert all(draft.answer.strip() for draft in drafts)
