"""Grading by answer type, and the refusal of records that could never be answered."""

import pytest
from growth import is_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.errors import UserError
from perl_megatron.reward.grade import ANSWER_TYPES, Question, check_expected, final_answer, is_right, read_answer
from perl_megatron.types import Grading


@pytest.mark.parametrize(
    ("answer_type", "expected", "given", "right"),
    [
        ("choice", "B", "(b)", True),
        ("choice", "B", "A", False),
        ("choice", "B", "", False),
        ("number", "1234.5", "1,234.50", True),
        ("number", "50%", "50", False),
        ("number", "7", "7.0000000000000000000001", False),
        ("ordering", "3, 1, 2", "image 3 > image 1 > image 2", True),
        ("ordering", "3, 1, 2", "3, 2, 1", False),
        ("ordering", "3, 1, 2", "3, 1", False),
        ("index", "2", "image 2", True),
        ("index", "2", "image 3", False),
        ("text", "Red ball", "red  BALL", True),
        ("text", "Red ball", "blue ball", False),
        ("text", "The red ball", "red ball", False),
        ("short_text", "The red ball.", "red ball", True),
        ("short_text", "two", "2", True),
        ("json", '{"a": [1, 2]}', '{"a":[1.0,2]}', True),
        ("json", '{"a": [1, 2]}', '{"a":[2,1]}', False),
        ("json", "[1]", "one", False),
        ("number", "3", "٣", True),
        ("choice", "B", "B. two dogs", False),  # nothing is known of the options
    ],
)
def test_is_right(answer_type, expected, given, right):
    assert is_right(given, expected, answer_type, where="record r") is right


def test_two_unreadable_answers_are_not_equal():
    with pytest.raises(UserError, match="cannot be read as 'number'"):
        is_right("many", "many", "number", where="record r")


@pytest.mark.parametrize(
    ("expected", "answer_type", "message"),
    [
        ("AB", "choice", "'AB' cannot be read as 'choice'"),
        ("", "text", "cannot be read as 'text'"),
        ("", "math", "cannot be read as 'math'"),
        ("1" * 2000, "number", "cannot be read as 'number'"),
        ("1", "sum", "answer type 'sum' is unknown"),
        ("{", "json", "cannot be read as 'json'"),
    ],
)
def test_bad_record_is_named(expected, answer_type, message):
    with pytest.raises(UserError, match=message) as error:
        check_expected(expected, answer_type, where="train.jsonl:7")
    assert error.value.where == "train.jsonl:7"


@pytest.mark.parametrize("answer_type", ANSWER_TYPES)
def test_overlong_answer_is_wrong(answer_type):
    assert is_right("1" * 1_000_000, "1" if answer_type != "choice" else "A", answer_type, where="r") is False


CHOICE = {"grading": Grading(options=("one cat", "two dogs", "no animal")), "option_slots": (0, 1, None)}


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("B", True),
        ("Two dogs", True),
        ("B. two dogs", True),
        ("image 2", True),
        ("the last image", True),
        ("A. two dogs", False),
        ("image 1", False),
        ("one cat", False),
        ("one cat or two dogs", False),
    ],
)
def test_choice_by_letter_text_and_image(given, right):
    assert is_right(given, "B", "choice", where="r", num_images=2, **CHOICE) is right
    assert is_right(given, "two dogs", "choice", where="r", num_images=2, **CHOICE) is right


@pytest.mark.parametrize(
    ("grading", "expected", "given", "right"),
    [
        (Grading(absolute_tolerance=0.1), "2", "2.1", True),
        (Grading(absolute_tolerance=0.1), "2", "2.1000001", False),
        (Grading(relative_tolerance=0.05), "-200", "-210", True),
        (Grading(relative_tolerance=0.05), "-200", "-210.01", False),
        (Grading(relative_tolerance=0.05), "0", "0.01", False),
        (Grading(absolute_tolerance=5, relative_tolerance=0.01), "1000", "1010", True),  # either suffices
        (Grading(absolute_tolerance=5, relative_tolerance=0.01), "100", "105", True),
        (Grading(unit="cm"), "12", "12", True),
        (Grading(unit="cm"), "12", "0.12 m", True),
        (Grading(unit="cm"), "12 cm", "120 mm", True),
        (Grading(unit="cm"), "12", "12 m", False),
        (Grading(unit="cm"), "12", "12 kg", False),
        (Grading(unit="cm", absolute_tolerance=0.5), "12", "0.125 m", True),
        (Grading(unit="cm", absolute_tolerance=0.5), "12", "0.1251 m", False),
        (Grading(unit="%"), "50", "50\\%", True),
        (Grading(unit="%"), "50", "0.5", False),
        (Grading(unit="apples"), "3", "3 apples", True),
        (Grading(unit="apples"), "3", "3 pears", False),
        (Grading(), "12", "12 cm", False),  # no unit was asked for: it might be the wrong one
    ],
)
def test_tolerances_and_units(grading, expected, given, right):
    assert is_right(given, expected, "number", where="r", grading=grading) is right


@pytest.mark.parametrize(
    ("expected", "answer_type", "grading", "message"),
    [
        ("D", "choice", CHOICE["grading"], "names none of the 3 options"),
        ("3 dogs", "choice", CHOICE["grading"], "cannot be read as 'choice'"),
        ("12", "number", Grading(unit="12 cm"), "the unit '12 cm' cannot be read"),
        ("12 kg", "number", Grading(unit="cm"), "cannot be read as 'number'"),
    ],
)
def test_record_that_contradicts_its_grading_is_named(expected, answer_type, grading, message):
    with pytest.raises(UserError, match=message):
        check_expected(expected, answer_type, where="r", grading=grading)


def test_json_is_found_in_the_box_or_in_a_block():
    block = 'So\n```json\n{"a": "}"}\n```\n'
    assert final_answer(block, "json") == '{"a": "}"}'
    assert final_answer(block + '\\boxed{{"a": 2}}', "json") == '{"a": 2}'
    assert final_answer(block + "\\boxed{see above}", "json") == '{"a": "}"}'
    assert final_answer(block, "text") is None
    assert final_answer("\\boxed{none}", "json") == "none"


ANYTHING = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from([*"AB(){}[]\\,.:%$^-19e", "\\text{", "\\frac{", "image 2", " cm", "two dogs", '"a":'])
    ).map("".join),
)


@given(ANYTHING, st.sampled_from(sorted(set(ANSWER_TYPES) - {"math"})))
@settings(deadline=None, max_examples=300)
def test_any_answer_is_graded_and_what_is_right_is_readable(answer, answer_type):
    expected = {"choice": "B", "text": "two", "json": "[1, 2]", "ordering": "2, 1"}.get(answer_type, "2")
    question = Question(
        expected, answer_type, "r", Grading(unit="cm", **{"options": ("one cat", "two dogs")}), (0, 1), 2
    )
    right = is_right(
        answer, expected, answer_type, where="r", grading=question.grading, option_slots=(0, 1), num_images=2
    )
    assert not right or read_answer(answer, question) is not None


@pytest.mark.parametrize("answer_type", ANSWER_TYPES)
@pytest.mark.parametrize("piece", ["\\text{", "(", "9**", "[", "image 1 ", "1,", "a ", "$", "²", "٣"])
def test_a_megabyte_is_graded_at_once(answer_type, piece):
    expected = {"choice": "B", "json": "[1]"}.get(answer_type, "2")

    def grade(size):
        answer = piece * (size // len(piece))
        assert is_right(answer, expected, answer_type, where="r") is False
        assert final_answer("\\boxed{" + answer + "}", answer_type) is not None or "{" in piece

    assert is_linear(grade, 1_000_000)
