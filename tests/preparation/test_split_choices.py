import pytest
from growth import is_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.data.answer_guess import guess_answer
from perl_megatron.preparation.choices import split_choice


@pytest.mark.parametrize(
    ("text", "answer", "stem", "options", "letter"),
    [
        ("Which? (A) red (B) blue", "(B)", "Which?", ("red", "blue"), "B"),
        ("Which?\nA. red\nB. blue\nC. green", "C. green", "Which?", ("red", "blue", "green"), "C"),
        ("Which? A) red, B) blue; C) green.", "b", "Which?", ("red", "blue", "green."), "B"),
        ("Which? (A) red, (B) blue", "Blue.", "Which?", ("red", "blue"), "B"),
        (
            "Is it?\nOptions:\n(A) yes\n(B) no\nAnswer with the letter.",
            "The answer is (A).",
            "Is it?",
            ("yes", "no"),
            "A",
        ),
        (
            "Is it?\n(A) yes\n(B) no\nThe last image is a hint.",
            "A",
            "Is it?\nThe last image is a hint.",
            ("yes", "no"),
            "A",
        ),
        ("Which? (A) <image> (B) <image>", "Answer: B", "Which?", ("<image>", "<image>"), "B"),
        ("(A) or (B)? Choices: (A) one (B) two", "(A)", "(A) or (B)?", ("one", "two"), "A"),
        ("Plan A. is best?\n(A) yes\n(B) no", "(B)", "Plan A. is best?", ("yes", "no"), "B"),
        ("Which?\n(A) a dog\n(B) a cat", "a cat", "Which?", ("a dog", "a cat"), "B"),
        ("Which?\n(A) a dog\n(B) a cat", "A dog is on it.", "Which?", ("a dog", "a cat"), None),
        ("Where? (A) New York (B) D.C. area", "D.C. area", "Where?", ("New York", "D.C. area"), "B"),
        ("Which?\n(A) red\n(B) blue", "A. blue", "Which?", ("red", "blue"), None),
        ("Which?\n(A) red\n(B) blue", "(C)", "Which?", ("red", "blue"), None),
        ("Which?\n(A) red\n(B) blue", "", "Which?", ("red", "blue"), None),
    ],
)
def test_questions_with_options(text, answer, stem, options, letter):
    choice = split_choice(text, answer)
    assert choice is not None
    assert (choice.stem, choice.options, choice.letter) == (stem, options, letter)


@pytest.mark.parametrize(
    "text",
    [
        "What is it?",
        "Is it A or B?",
        "(A) alone",
        "Who is Mr. A. Smith?",
        "(B) two (A) one",
        "(A) same (B) same",
        "(A) (B) x",
    ],
)
def test_questions_without(text):
    assert split_choice(text, "A") is None


@pytest.mark.parametrize(
    "text",
    [
        lambda n: "options" + " " * 9 * n + "x (A) a (B) b",
        lambda n: "(A) a (B) b\n" + " " * 9 * n + "y",
        lambda n: "(A) a" + ",; " * 3 * n + "(B) b",
        lambda n: "A. " * 2 * n + " " * 5 * n,
        lambda n: "A. B. " * n + " " * 5 * n,
        lambda n: "A. x " * n + " " * 4 * n + "B. y",
        lambda n: "A. " * 2 * n + "B." + " " * 5 * n + "x",
        lambda n: "A. " * 2 * n + "B." + "," * 5 * n + " C. x",
        lambda n: "A. x\n" * 2 * n + "B. y",
    ],
)
def test_no_text_takes_long(text):
    assert is_linear(lambda n: split_choice(text(n), "A"), 8_000)


words = st.text("abcdefgh ", min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(deadline=None, max_examples=100)
@given(words, st.lists(words, min_size=2, max_size=6, unique=True), st.data())
def test_what_is_written_is_read_back(stem, options, data):
    right = data.draw(st.integers(0, len(options) - 1))
    letter = chr(ord("A") + right)
    style = data.draw(st.sampled_from(["({})", "{}.", "{})", "{}:"]))
    separator = data.draw(st.sampled_from(["\n", " "]))
    listed = separator.join(f"{style.format(chr(ord('A') + k))} {option}" for k, option in enumerate(options))
    choice = split_choice(
        f"{stem}{separator}{listed}", data.draw(st.sampled_from([letter, f"({letter})", options[right]]))
    )
    assert choice is not None
    assert (choice.stem, choice.options) == (stem, tuple(options))
    assert choice.letter in (letter, None) or len(options[right]) == 1


@settings(deadline=None, max_examples=200)
@given(st.text("ABCabc().:\n <image>,;"), st.text("ABCabc(). :"))
def test_any_text_is_split_or_not(text, answer):
    choice = split_choice(text, answer)
    if choice is not None:
        assert len(choice.options) >= 2
        assert all(choice.options)
        assert choice.letter is None or ord(choice.letter) - ord("A") < len(choice.options)
        assert "".join([choice.stem, *choice.options]).count("<image>") == text.count("<image>")


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["U.S. army", "D.C. area", "B. blue", "red", "a"]), st.text("ABab(). redlu", max_size=8))
def test_the_import_reads_the_same_letter(option, answer):
    text = f"Which one?\n(A) blue\n(B) {option}"
    for given_answer in (answer, option, f"{option} {answer}"):
        choice, guess = split_choice(text, given_answer), guess_answer(text, given_answer)
        if choice is not None:
            assert choice.letter == (guess.answer if guess.answer_type == "choice" else None)
