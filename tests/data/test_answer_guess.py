import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.data.answer_guess import (
    MAX_GUESSED,
    GuessedAnswer,
    guess_answer,
    lettered_options,
    option_named_by,
    with_options,
)
from perl_megatron.record_check import check_answer
from perl_megatron.types import Record

LETTERED = "<image>Which animal?\n(A) a cat\n(B) a dog\n(C) no animal."
OPTIONS = ("a cat", "a dog", "no animal.")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[("B", "B"), ("(B)", "B"), ("(b)", "B"), ("B.", "B"), ("B. a dog", "B"), ("(B) a dog.", "B")],
        *[("Option B", "B"), ("The answer is B", "B"), ("Answer: (C)", "C"), ("\\boxed{A}", "A"), ("$B$", "B")],
        *[("The correct option is B.", "B"), ("choice: C", "C"), ("b", "B"), ("c)", "C")],
        *[("a dog", "B"), ("A Cat.", "A"), ("no animal", "C")],
    ],
)
def test_choices_are_letters_of_options(answer, letter):
    assert guess_answer(LETTERED, answer) == GuessedAnswer(letter, "choice", OPTIONS)


@pytest.mark.parametrize(
    ("text", "answer", "expected", "answer_type"),
    [
        (LETTERED, "D", "D", "text"),  # no such option
        (LETTERED, "B. a cat", "B. a cat", "text"),  # which one?
        (LETTERED, "d", "d", "text"),
        ("Which is it?", "B", "B", "text"),  # no options
        ("How many?", "12", "12", "number"),
        ("How many?", " -1,200.5. ", "-1,200.5", "number"),
        ("How many?", "$\\boxed{7}$", "7", "number"),
        ("How many?", "The final answer is: 3.", "3", "number"),
        ("How many?", "1,2", "1,2", "math"),  # no thousands
        ("Area?", "3/4", "3/4", "math"),
        ("Area?", "$\\frac{1}{2}$ and $x$", "$\\frac{1}{2}$ and $x$", "math"),
        ("Area?", "2\\sqrt{3}", "2\\sqrt{3}", "math"),
        ("Area?", "x^2", "x^2", "math"),
        ("Area?", "12 cm", "12 cm", "math"),
        ("What?", "5 apples", "5 apples", "text"),
        ("What?", "A red car.", "A red car.", "text"),
        ("What?", "$", "$", "text"),
        ("What?", "$1$ and $2$", "$1$ and $2$", "text"),
        ("What?", "\\boxed{1}, \\boxed{2}", "\\boxed{1}, \\boxed{2}", "math"),
    ],
)
def test_other_answers(text, answer, expected, answer_type):
    assert guess_answer(text, answer) == GuessedAnswer(expected, answer_type)


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (("New York", "D.C. area", "Rome", "Oslo"), "D.C. area", "B"),  # not D
        (("New York", "D.C. area", "Rome", "Oslo"), "D. Oslo", "D"),
        (("U.S. army", "a shop"), "U.S. army", "A"),
        (("red", "blue"), "A. blue", None),  # letter and text contradict each other
        (("red", "blue"), "(B) blue", "B"),
        (("b", "a"), "a", "B"),
        (("red", "red"), "red", None),
        ((), "A", None),
    ],
)
def test_a_letter_counts_unless_another_text_follows_it(options, answer, letter):
    assert option_named_by(answer, options) == letter


@pytest.mark.parametrize(
    "answer",
    [
        *["$" * 10**5 + "a", "1" * 10**5 + "é", "\\boxed{" * 12_500 + "1" + "}" * 12_500, "answer " * 14_000 + "red"],
        *[
            "the answer is " * 7_000 + "B",
            "(A)" + " " * 50_000 + "x" * 50_000,
            "." * 10**5,
            "1,234" * 20_000,
            "option " * 14_000,
        ],
    ],
)
@pytest.mark.parametrize("size", [MAX_GUESSED, 10**5])
def test_no_answer_takes_long(answer, size):
    begin = time.process_time()
    guess = guess_answer(LETTERED, answer[:size])
    assert time.process_time() - begin < 1
    assert guess.answer_type == "text" or size == MAX_GUESSED


def test_long_answers_and_many_wrappers_stay_as_they_are():
    assert guess_answer("?", "\\boxed{" * 10 + "7" + "}" * 10) == GuessedAnswer("7", "number")
    nested = "\\boxed{" * 40 + "7" + "}" * 40
    assert guess_answer("?", nested) == GuessedAnswer(nested, "math")
    assert guess_answer("?", " " + "1" * MAX_GUESSED).answer_type == "number"
    assert guess_answer("?", "1" * (MAX_GUESSED + 1)) == GuessedAnswer("1" * (MAX_GUESSED + 1), "text")


def test_options_are_written_below_a_question_that_does_not_list_them():
    assert with_options("Which?", ["a cat", "(B) a dog"]) == "Which?\n(A) a cat\n(B) a dog"
    assert with_options(LETTERED, ["x", "y", "z"]) == LETTERED
    assert lettered_options(with_options("Which?", ["1", "2"])) == ("1", "2")
    assert with_options("Which?", []) == "Which?"


@given(text=st.text(max_size=80) | st.just(LETTERED), answer=st.text("ABCab()., $\\boxed{}1234-+/^", max_size=30))
@settings(max_examples=200, deadline=None)
def test_guessed_choices_and_numbers_can_be_graded_and_stay_what_they_are(text, answer):
    guess = guess_answer(text, answer)
    assert (guess.answer == "") == (answer.strip() == "")
    if guess.answer_type in ("choice", "number"):
        check_answer(Record("q", (), text or "?", guess.answer, guess.answer_type))
    assert guess_answer(text, guess.answer).answer == guess.answer
