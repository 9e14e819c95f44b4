"""Format and boxed answer: against the regular expression and a slow reference, and in linear time."""

import re

import pytest
from growth import is_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.reward.boxed import follows_format, last_boxed

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
PIECES = ["<think>", "</think>", "\\boxed{", "{", "}", "\\{", "\\}", "\\", "\n", "3", " "]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\nSo \\boxed{3}.", True),
        ("<think></think>\\boxed{}", True),
        (" <think>a</think>\\boxed{3}", False),
        ("a</think>\\boxed{3}", False),
        ("<think>a \\boxed{3}", False),
        ("<think>a \\boxed{3}</think> 3", False),
        ("<think>a</think>\\boxed{3", False),
        ("", False),
    ],
)
def test_format(text, expected):
    assert follows_format(text) is expected


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(deadline=None)
def test_format_equals_the_regular_expression(text):
    text = "<think>" + text
    assert follows_format(text) is (FORMAT.fullmatch(text) is not None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{3}", "3"),
        ("first \\boxed{1}, then \\boxed{2} and {x}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\\\boxed{4}", "4"),
        ("} { \\boxed{5}", "5"),
        ("\\boxed{}", ""),
        ("\\boxed{{1}", None),
        ("boxed{1}", None),
        ("no answer", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


def slow_last_boxed(text):
    """Tries every opening box from the last one back; counts braces that no backslash escapes."""
    for opening in reversed(list(re.finditer(r"\\boxed\{", text))):
        depth, position = 1, opening.end()
        while position < len(text):
            if text[position] == "\\":
                position += 2
                continue
            depth += (text[position] == "{") - (text[position] == "}")
            if depth == 0:
                return text[opening.end() : position]
            position += 1
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "a"]), max_size=14).map("".join))
@settings(deadline=None)
def test_last_boxed_equals_the_slow_reference(text):
    assert last_boxed(text) == slow_last_boxed(text)


@given(st.text())
@settings(deadline=None)
def test_any_text_is_read(text):
    follows_format(text)
    last_boxed(text)


@pytest.mark.parametrize("piece", ["\\boxed{", "</think>", "{", "}", "\\", "\\boxed{}", "<think></think>", "a"])
def test_a_megabyte_takes_linear_time(piece):
    def read(size):
        text = "<think>" + piece * (size // len(piece))
        follows_format(text)
        last_boxed(text)

    assert is_linear(read, 1_000_000)
