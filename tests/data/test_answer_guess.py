import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.data.answer_guess import GuessedAnswer, guess_answer, lettered_options, with_options
from perl_megatron.record_check import check_answer
from perl_megatron.types import Record

LETTERED = "<image>Which animal?\n(A) a cat\n(B) a dog\n(C) no animal."
OPTIONS = ("a cat", "a dog", "no animal.")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[("B", "B"), ("(B)", "B"), ("(b)", "B"), ("B.", "B"), ("B. a dog", "B"), ("(B) a dog.", "B")],
        *[("Option B", "B"), ("The answer is B", "B"), ("Answer: (C)", "C"), ("\\boxed{A}", "A"), ("$B$", "B")],
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
        (LETTERED, "b", "b", "text"),
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
