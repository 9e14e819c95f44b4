import pytest
from growth import is_linear

from perl_megatron.data.contract.options import lettered_options


def texts(text: str, count: int | None = None) -> list[str]:
    return [text[option.start : option.end] for option in lettered_options(text, count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which?\n(A) a cat\n(B) a dog\nAnswer with the letter.", ["a cat", "a dog"]),
        ("Which? A. cat B. dog C. both", ["cat", "dog", "both"]),
        ("Which? A) cat\nB) dog", ["cat", "dog"]),
        ("A: cat\nB: dog", ["cat", "dog"]),
        ("A=1 B=2", ["1", "2"]),
        ("(A) cat (B) dog (C) both (A) and (B) (D) none", ["cat", "dog", "both (A) and (B)", "none"]),
        ("(A) cat (B) dog (C) neither (A) nor (B)", ["cat", "dog", "neither (A) nor (B)"]),
        ("(A)\n<image>\n(B)\n<image>\nWhich?", ["<image>", "<image>"]),
        ("(A) this image (B) that image (C) none", ["this image", "that image", "none"]),
        ("Compare plan (A) with plan (B).\n(A) better (B) worse", ["better", "worse"]),
        ("Compare figures (A) and (B).\n(A) better (B) worse", ["better", "worse"]),
        ("Image A: <image>\nImage B: <image>\nSame?", []),
        ("Figure (A) and Figure (B) differ", []),
        ("Compare (A), (B) and (C).", []),
        ("Plan (A) and (B)", []),
        ("(A) alone", []),
        ("(B) dog (C) cat", []),
        ("vitamin A. Then B", []),
        ("", []),
    ],
)
def test_options_are_found_in_the_text(text, expected):
    assert texts(text) == expected


def test_a_known_number_of_options():
    text = "(A) cat (B) dog (C) cow\n(A) yes (B) no"
    assert texts(text) == texts(text, 2) == ["yes", "no"]
    assert texts(text, 3) == ["cat", "dog", "cow"]
    assert texts(text, 4) == []
    assert texts("(A) cat (B) dog (C) cow", 2) == ["cat", "dog"]
    assert texts("(A) cat", 1) == ["cat"]


def test_hostile_texts_take_linear_time():
    def read(repeats: int) -> None:
        line = "y" * (400 * repeats)
        for text in ("(A) x " * repeats, "(A) x (B) y " * repeats + "(C) z", "(A) " * repeats):
            lettered_options(text + "(B) " + line, None)
            lettered_options(text + line.replace("y", " "), None)
            lettered_options(text + "(B) " + line.replace("y", ",") + " (C) z", None)

    assert is_linear(read, 2000)


class CountedText(str):
    """A text that counts how often one of its characters is looked at."""

    looks = 0

    def __getitem__(self, key):
        type(self).looks += 1
        return super().__getitem__(key)


@pytest.mark.parametrize("before_blanks", ["A. ", "A. B. ", "A. x "])
@pytest.mark.parametrize("after_blanks", ["", "x", "B. x"])
def test_blanks_behind_many_letters_are_looked_at_once(before_blanks, after_blanks):
    CountedText.looks = 0
    lettered_options(CountedText(before_blanks * 2000 + " " * 10000 + after_blanks), None)
    assert CountedText.looks < 30000  # once for each letter meant twenty million


@pytest.mark.parametrize(
    "text",
    [
        lambda n: "A. " * 2 * n + " " * 4 * n,
        lambda n: "A. " * 2 * n + " " * 4 * n + "B. x",
        lambda n: "A. " * 2 * n + "x" * 4 * n,
        lambda n: "A. " * 2 * n + "B. " + "!" * 4 * n + "C. x",
        lambda n: "A. x B. " * n,
        lambda n: "(A) " * 2 * n,
        lambda n: "A.\n" * 3 * n,
    ],
    ids=range(7),
)
def test_no_text_takes_long(text):
    assert is_linear(lambda n: lettered_options(text(n), None), 10_000)


def test_the_letter_stands_before_the_text():
    text = "Which? (A)  cat  (B) dog"
    (first, second) = lettered_options(text, None)
    assert (text[first.marker : first.start], text[first.start : first.end]) == ("(A)  ", "cat")
    assert text[second.marker : second.end] == "(B) dog"
