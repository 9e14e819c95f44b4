"""Readers of answers: what each accepts, what each refuses, that none crashes or stalls."""

from fractions import Fraction

import pytest
from growth import is_linear, least_seconds
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.reward.answers import (
    MAX_LENGTH,
    read_choice,
    read_index,
    read_number,
    read_ordering,
    read_short_text,
    read_text,
)
from perl_megatron.reward.choices import read_option
from perl_megatron.reward.quantities import read_quantity, read_unit

READERS = [
    read_choice,
    read_index,
    read_number,
    read_ordering,
    read_short_text,
    read_text,
    read_option,
    read_quantity,
    read_unit,
]


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(B)",
        "(b)",
        "B.",
        "B)",
        "B:",
        " B ",
        "\\text{B}",
        "$B$",
        "\\textbf{(B)}",
        "Ｂ",
        "（Ｂ）",
        "𝐁",
        "Option B",
        "answer: B",
        "\\left(B\\right)",
        "\\(B\\)",
    ],
)
def test_choice(answer):
    assert read_choice(answer) == "B"


@pytest.mark.parametrize(
    "answer", ["", "A or B", "AB", "A cat", "2", "A) or B)", "\\text{A} B", "É", "options", "А (Cyrillic)"]
)
def test_not_a_choice(answer):
    assert read_choice(answer) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("7", Fraction(7)),
        ("007", Fraction(7)),
        ("+7.", Fraction(7)),
        ("-3.50", Fraction(-7, 2)),
        ("−3", Fraction(-3)),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1{,}234", Fraction(1234)),
        ("1\\,234", Fraction(1234)),
        ("3/4", Fraction(3, 4)),
        ("- 3 / 4", Fraction(-3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac{ 3 }{ 4 }", Fraction(-3, 4)),
        ("1.5e3", Fraction(1500)),
        ("2E-2", Fraction(1, 50)),
        ("50%", Fraction(1, 2)),
        ("50\\%", Fraction(1, 2)),
        ("$12$", Fraction(12)),
        ("\\text{12}", Fraction(12)),
        ("\\(12\\)", Fraction(12)),
        ("\\frac12", Fraction(1, 2)),
        ("\\tfrac 3 4", Fraction(3, 4)),
        ("1,\\!234", Fraction(1234)),
        ("12\u2009345", Fraction(12345)),
        ("12\u202f345", Fraction(12345)),
        ("٣", Fraction(3)),
        ("१२.५", Fraction(25, 2)),
        ("１２", Fraction(12)),
        ("－３", Fraction(-3)),
        ("–3", Fraction(-3)),
    ],
)
def test_number(answer, expected):
    assert read_number(answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "x",
        "1 2",
        "1,23",
        "1234,567",
        "1/0",
        "1.2.3",
        "5 cm",
        "nan",
        "inf",
        "1e9999",
        "--1",
        "5%%",
        "10²",
        "½",
        "3½",
        "1\\,2",
        "\\frac123",
    ],
)
def test_not_a_number(answer):
    assert read_number(answer) is None


def test_percent_sign_counts():
    assert read_number("50%") != read_number("50")
    assert read_number("50%") == read_number("0.5")


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
@settings(deadline=None)
def test_decimals_are_exact(digits, places):
    sign, text = "-" if digits < 0 else "", str(abs(digits)).rjust(places + 1, "0")
    written = sign + (text[:-places] + "." + text[-places:] if places else text)
    assert read_number(written) == Fraction(digits, 10**places)
    assert read_number(f"{abs(digits):,}") == abs(digits)


@pytest.mark.parametrize(
    "answer",
    [
        "2",
        "image 2",
        "Image 2",
        "Figure #2",
        "picture 2",
        "\\text{image 2}",
        "image2",
        "the second image",
        "2nd photo",
        "The Second Picture.",
        "image number 2",
        "Image no. 2",
    ],
)
def test_index(answer):
    assert read_index(answer) == 2


@pytest.mark.parametrize(
    "answer", ["image", "image two", "imagery 2", "image 1 or 2", "second", "the last image", "2th thing"]
)
def test_not_an_index(answer):
    assert read_index(answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        "3, 1, 2",
        "3 1 2",
        "3,1,2",
        "3>1>2",
        "3 > 1 > 2",
        "3 -> 1 -> 2",
        "3 \\rightarrow 1 \\to 2",
        "3 → 1 → 2",
        "3; 1; 2",
        "3 < 1 < 2",
        "3-1-2",
        "(3), (1), (2)",
        "3, 1, and 2",
        "312",
        "[3, 1, 2]",
        "(3, 1, 2)",
        "\\{3, 1, 2\\}",
        "image 3, image 1, image 2",
        "Image3, Image1, Image2",
        "images 3, 1, 2",
        "\\text{image 3}, \\text{image 1}, \\text{image 2}",
    ],
)
def test_ordering(answer):
    assert read_ordering(answer) == (3, 1, 2)


def test_ordering_of_ten_images():
    assert read_ordering("10, 9, 8, 7, 6, 5, 4, 3, 2, 1") == (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)


@pytest.mark.parametrize("answer", ["", "three, one", "3, x, 2", "1 or 2", "\\too 1", "image", "3.1 2", "[]"])
def test_not_an_ordering(answer):
    assert read_ordering(answer) is None


def test_text():
    assert read_text("  The  Red\nBall ") == read_text("the red ball") == "the red ball"
    assert read_text("ball") != read_text("balls")
    assert read_text(" ") is None


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("The red ball.", "red ball", True),
        ("a T-shirt", "T shirt", True),
        ("Two", "2", True),
        ("don't", "dont", True),
        ("1,000", "1000", True),
        ("50 %", "50%", True),
        ('"yes"!', "Yes", True),
        ("e\u0301t\u00e9", "\u00e9t\u00e9", True),
        ("1.5", "15", False),
        (".5", "5", False),
        ("-5", "5", False),
        ("1/2", "12", False),
        ("12:30", "1230", False),
        ("50%", "50", False),
        ("x < 5", "x > 5", False),
        ("A", "the", False),
        ("€5", "5", False),
        ("cat", "cats", False),
    ],
)
def test_short_text(first, second, same):
    assert read_short_text(first) is not None
    assert (read_short_text(first) == read_short_text(second)) is same


def test_no_short_text():
    assert read_short_text("...") is None
    assert read_short_text("x" * (MAX_LENGTH + 1)) is None


def test_text_commands_inside_each_other():
    assert read_choice("\\text{\\textbf{\\mathrm{(B)}}}") == "B"


HOSTILE = st.one_of(
    st.text(max_size=MAX_LENGTH),
    st.lists(
        st.sampled_from(
            [
                "\\text{",
                "}",
                "{",
                "(",
                "1",
                ",",
                "123",
                "image",
                " ",
                "\\frac{",
                "e9",
                "%",
                "/",
                "$",
                "-",
                ".",
                "cm",
                "^2",
                "²",
                "\\left",
                "\ud800",
                "\x00",
                "٣",
                "the second image",
                "{,}",
            ]
        ),
        max_size=120,
    ).map("".join),
)


@given(HOSTILE)
@settings(deadline=None)
def test_readers_never_crash_or_stall(answer):
    assert least_seconds(lambda: [reader(answer) for reader in READERS]) < 0.5


@pytest.mark.parametrize(
    "piece", ["\\text{", "(", " ", "( ", "1", "1,", "123,", "image ", "image", "}", "$", "\\", "\\frac{"]
)
@pytest.mark.parametrize("ending", ["", ")", "x"])
def test_longest_answers_are_read_quickly(piece, ending):
    def read(length):
        answer = ("(" + piece * length)[: length - 1] + ending
        for reader in READERS:
            reader(answer)

    assert is_linear(read, MAX_LENGTH)
