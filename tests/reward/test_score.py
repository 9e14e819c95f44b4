"""The reward of a response: parts, finish reason, exact weighted sum."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.config.schema import RewardConfig
from perl_megatron.errors import UserError
from perl_megatron.reward.score import readable, score, total, weights
from perl_megatron.types import View

CONFIG = RewardConfig()


def view(answer="2", answer_type="number"):
    return View("r", 1, (1, 0), (), "?", answer, answer_type)


@pytest.mark.parametrize(
    ("text", "accuracy", "form"),
    [
        ("<think>x</think> \\boxed{2}", 1, 1),
        ("<think>x</think> \\boxed{3}", 0, 1),
        ("\\boxed{2}", 1, 0),
        ("\\boxed{2} no, \\boxed{3}", 0, 0),
        ("<think>it is 2</think> 2", 0, 0),
        ("", 0, 0),
    ],
)
def test_parts(text, accuracy, form):
    assert score(text, view(), "stop", CONFIG) == {"accuracy": accuracy, "format": form}


def test_a_view_is_graded_by_its_own_answer():
    text = "<think>x</think> \\boxed{1, 2}"
    assert score(text, view("1, 2", "ordering"), "stop", CONFIG)["accuracy"] == 1
    assert score(text, view("2, 1", "ordering"), "stop", CONFIG)["accuracy"] == 0


def test_truncated_response_has_no_format_but_its_answer_counts():
    parts = score("<think>x</think> \\boxed{2} and so on and", view(), "length", CONFIG)
    assert parts == {"accuracy": 1, "format": 0}


def test_bad_record_is_named():
    with pytest.raises(UserError, match="record r"):
        score("\\boxed{2}", view("two"), "stop", CONFIG)


def test_without_thoughts_where_none_are_asked_for():
    plain, thought = "So \\boxed{2}", "<think>x</think> \\boxed{2}"
    config = RewardConfig(format_style="boxed")
    assert [score(text, view(), "stop", config)["format"] for text in (plain, thought, "2")] == [1, 1, 0]
    assert score(plain, view(), "length", config)["format"] == 0


@pytest.mark.parametrize(
    ("text", "answer", "answer_type", "expected"),
    [
        ("\\boxed{3}", "2", "number", True),
        ("\\boxed{many}", "2", "number", False),
        ("3", "2", "number", False),
        ("\\boxed{C}", "B", "choice", True),
        ("\\boxed{A or B}", "B", "choice", False),
        ("\\boxed{1 or 2}", "1, 2", "ordering", False),
        ("\\boxed{ }", "x", "text", False),
        ("\\boxed{y}", "x", "text", True),
        ("\\boxed{2x}", "x", "math", True),
        ("\\boxed{%s}" % ("(" * 20 + ")" * 20), "x", "math", False),
        ("```\n[2]\n```", "[1]", "json", True),
        ("\\boxed{[2}", "[1]", "json", False),
    ],
)
def test_readable_is_not_the_same_as_right(text, answer, answer_type, expected):
    assert readable(text, view(answer, answer_type)) is expected


def test_total_of_the_defaults():
    assert [total({"accuracy": a, "format": f}, CONFIG) for a, f in ((1, 1), (1, 0), (0, 1), (0, 0))] == [
        1,
        0.9,
        0.1,
        0,
    ]


def test_equal_sums_are_equal_floats():
    assert 0.1 * 1 + 0.2 * 1 != 0.3 * 1 + 0.0 * 1  # what plain floats do
    assert total({"accuracy": 1.0, "format": 1.0}, RewardConfig(accuracy=0.1, format=0.2)) == 0.3
    assert total({"accuracy": 0.5, "format": 1.0}, RewardConfig(accuracy=0.2, format=0.2)) == 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_part_that_is_not_finite_is_refused(bad):
    with pytest.raises(UserError, match="'format' is"):
        total({"accuracy": 1.0, "format": bad}, CONFIG)


@given(
    st.text(),
    st.sampled_from(["number", "ordering", "index", "text", "short_text", "json"]),
    st.sampled_from(["stop", "length"]),
)
@settings(deadline=None)
def test_any_text_gets_a_score(text, answer_type, finish_reason):
    for response in (text, f"<think>{text}</think>\\boxed{{{text}}}"):
        parts = score(response, view("12", answer_type), finish_reason, CONFIG)
        assert set(parts.values()) <= {0.0, 1.0}
        assert readable(response, view("12", answer_type)) >= parts["accuracy"]


def test_weights_of_functions():
    config = RewardConfig(accuracy=0.5, format=0.1, functions=("brevity=0.2", "my.module:Length.penalty = -0.1"))
    unset = dict.fromkeys(("judge", "consistency", "overlong"), 0.0)
    assert weights(config) == {"accuracy": 0.5, "format": 0.1, **unset, "brevity": 0.2, "penalty": -0.1}
    assert total({"accuracy": 1.0, "format": 0.0, "brevity": 0.5, "penalty": 1.0}, config) == 0.5


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (("brevity",), "is not NAME=WEIGHT"),
        (("brevity=much",), "is not NAME=WEIGHT"),
        (("brevity=nan",), "is not NAME=WEIGHT"),
        (("a:b:c=1",), "is not NAME=WEIGHT"),
        (("a/b=1",), "is not NAME=WEIGHT"),
        (("accuracy=1",), "already a reward part 'accuracy'"),
        (("a:brevity=1", "b:brevity=1"), "already a reward part 'brevity'"),
    ],
)
def test_bad_functions_are_refused(functions, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(functions=functions)
