"""The paper's sources in the wordings of their data: which contract each record gets, and what its view says."""

from dataclasses import replace
from pathlib import Path

import pytest

from perl_megatron.data.contract.contract_templates import DEFAULT_TEMPLATES, OrderLabel, apply_template, load_templates
from perl_megatron.data.permutation import apply_order, validate_contract
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, PermutationContract, Record, ReferenceRule

TEMPLATES = load_templates()
CHANGES, SAME = OrderLabel(should_change=True), OrderLabel(should_change=False)
TWO, THREE, FIVE = ("<image>" * count + "\n" for count in (2, 3, 5))
ARE_IMAGES = OrderLabel(should_change=True, is_multichoice_images=True)


def record(text: str, answer: str) -> Record:
    return Record("q1", tuple(Path(f"{slot}.png") for slot in range(text.count("<image>"))), text, answer)


def rotated(permutable: Record) -> tuple[str, str]:
    """Text and answer after each movable image has moved to the movable slot before its own."""
    movable = sorted(permutable.contract.movable)
    order = list(range(len(permutable.images)))
    for slot, old in zip(movable, movable[1:] + movable[:1], strict=True):
        order[slot] = old
    view = apply_order(permutable, order, 1)
    return view.text, view.answer


@pytest.mark.parametrize(
    ("family", "text", "answer", "label", "movable", "rotated_text", "rotated_answer"),
    [
        ("nlvr2", TWO + "The left image contains twice as many dogs as the right image. True or False?", "True",
         None, (0, 1), "The right image contains twice as many dogs as the left image.", "True"),
        ("nlvr2", "Image 1: <image>\nImage 2: <image>\nOne image shows a dog facing left. (A) True (B) False", "B",
         None, (0, 1), "One image shows a dog facing left.", "B"),
        ("dreamsim", THREE + "Which is most like the first image?\n(A) the second image\n(B) the third image",
         "A", None, (1, 2), "the first image?\n(A) the second image\n(B) the third image", "B"),
        ("dreamsim", "Reference: <image>\nA: <image>\nB: <image>\nWhich is most like the reference?", "B",
         None, (1, 2), "A: <image>\nB: <image>", "A"),
        ("dreamsim", THREE + "Which image is most like the first image?", "The third image.",
         None, (1, 2), "like the first image?", "The second image."),
        ("dreamsim", THREE + "Which image is most like image 1?", "Image 2",
         None, (1, 2), "like image 1?", "Image 3"),
        ("dreamsim", THREE + "Which is most like the first? image A or image B?", "A",
         None, None, "'the first?' cannot follow", None),
        ("iconqa", "<image>\nWhat comes next?\nChoices: (A) <image> (B) <image> (C) <image>", "C",
         None, (1, 2, 3), "(A) <image>", "B"),
        ("iconqa", "<image>\nWhat comes next?\n<image><image><image>", "A", None, (1, 2, 3), "What comes next?", "C"),
        ("showhowto_choice", TWO + "Next?\n(A) <image> (B) <image> (C) <image> (D) <image> (E) None of these", "E",
         None, (2, 3, 4, 5), "(E) None of these", "E"),
        ("showhowto_choice", FIVE + "Which of the last four images is next?", "D",
         None, (1, 2, 3, 4), "the last four images", "C"),
        ("showhowto_ordering", THREE + "Order them.\n(A) 1, 2, 3\n(B) 3 -> 1 -> 2\n(C) none of these", "B",
         None, (0, 1, 2), "(A) 3, 1, 2\n(B) 2 -> 3 -> 1\n(C) none of these", "B"),
        ("showhowto_ordering", THREE + "Order them.", "2, 3, 1", None, (0, 1, 2), "Order them.", "1, 2, 3"),
        ("mantis", TWO + "Which image shows a dog? (A) image 1 (B) image 2 (C) neither", "A",
         None, (0, 1), "(A) image 2 (B) image 1 (C) neither", "A"),
        ("mantis", TWO + "Which image shows a dog? (A) image 1 (B) image 2 (C) neither", "A",
         ARE_IMAGES, (0, 1), "(A) image 1 (B) image 2 (C) neither", "B"),
        ("mantis", TWO + "Which image shows a dog? (A) first (B) second (C) both", "B",
         None, (0, 1), "(A) second (B) first (C) both", "B"),
        ("mantis", TWO + "How many dogs are there in total?", "2", None, (0, 1), "in total?", "2"),
        ("mantis", TWO + "Which image shows a dog?", "2", None, (0, 1), "shows a dog?", "1"),
        ("mantis", "Image A: <image> Image B: <image>\nWhich image shows a dog?", "B", None, (0, 1), "Image A: ", "A"),
        ("mantis", TWO + "Which image shows a dog?", "The left one", None, (0, 1), "a dog?", "The right one"),
        ("mantis", TWO + "Is the dog in the second image black?", "yes", CHANGES, (0, 1), "in the first", "yes"),
        ("mantis", TWO + "Which animal is in both?", "a cat", SAME, (0, 1), "Which animal", "a cat"),
        ("some_subset", TWO + "How many dogs are there in total?", "2", None, (0, 1), "in total?", "2"),
        ("mantis", THREE + "Which image is more like image 2? (A) image 1 (B) image 3", "A", ARE_IMAGES,
         (0, 2), "like image 2? (A) image 1", "B"),
        ("dreamsim", THREE + "Which image is most like the reference image?", "Image 3",
         None, (1, 2), "the reference image?", "Image 2"),
        # Not permutable, for a reason.
        ("mantis", TWO + "Is there a dog in the first of the two images?", "yes", None, None, "cannot follow", None),
        ("mantis", TWO + "How many cars are in the original image?", "4", None, None, "cannot follow", None),
        ("mantis", TWO + "How many cars are in the other image?", "4", None, None, "cannot follow", None),
        ("mantis", TWO + "How many objects disappeared?", "3", None, None, "a sequence", None),
        ("mantis", TWO + "Was the man added?", "yes", None, None, "a sequence", None),
        ("mantis", TWO + "How many dogs are in pair 2?", "3", None, None, "'pair 2' may name", None),
        ("nlvr2", TWO + "Image A shows a dog.", "True", None, None, "by 'letter', which the template", None),
        ("dreamsim", "<image>\n<image> <image>\nIs image B like it?", "A", None, None, "cannot tell the options", None),
        ("iconqa", THREE + "Which is like the leftmost image?", "A", None, None, "by 'position'", None),
        ("nlvr2", TWO + "A dog stands on the left.", "True", None, None, "is ambiguous", None),
        ("nlvr2", THREE + "The left image shows a dog.", "True", None, None, "no template for 'nlvr2'", None),
        ("iconqa", THREE + "Which? (A) image 9 (B) image 3", "A", None, None, "no template", None),
        ("showhowto_choice", FIVE + "Next? (A) this (B) that", "A", None, None, "2 options", None),
        ("showhowto_ordering", TWO + "Order? (A) 1, 2 (B) the usual", "A", None, None, "names none", None),
        ("showhowto_ordering", TWO + "Order? (A) 1, 2 (B) 2, 3", "A", None, None, "does not exist", None),
        ("mantis", "Which pair? (A) <image> <image> (B) <image> <image>", "B", None, None, "images of slots", None),
        ("mantis", TWO + "Is there a dog?", "yes", CHANGES, None, "no reference says how", None),
        ("mantis", TWO + "Which animal is in both?", "a cat", None, None, "no template for 'mantis' fits", None),
        ("mantis", TWO + "What happens in the next image?", "yes", None, None, "the images are a sequence", None),
        ("mantis", TWO + "What colours do the dogs have, respectively?", "A", None, None, "a sequence", None),
        ("mantis", TWO + "How many dogs are in the first panel?", "3", None, None, "'first panel' may name", None),
        ("mantis", TWO + "How many dogs are in slide 2?", "3", None, None, "'slide 2' may name", None),
        ("mantis", "Is <image> larger than <image>?", "yes", None, None, "'larger than' beside a placeholder", None),
        ("mantis", "Query: <image> Candidate: <image> Equal?", "yes", None, None, "give its image a role", None),
        ("mantis", "The reference image is <image> <image> Equal?", "yes", None, None, "give its image a role", None),
        ("mantis", "<image> shows a dog. Does <image>?", "yes", None, None, "give its image a role", None),
        ("mantis", TWO + "Where is the cat? (A) first (B) second", "A", None, None, "may name an image", None),
        ("mantis", "<image>\nHow many dogs?", "2", None, None, "fewer than two images", None),
        ("mantis", TWO + "Do image 1 or 2 show a dog?", "yes", None, None, "ambiguous", None),
        ("mantis", TWO + "Does image 3 show a dog?", "yes", None, None, "does not exist", None),
        ("mantis", TWO + "Which image shows a dog? (A) the big one (B) image 1", "A", None, None, "names none", None),
    ],
)  # fmt: skip
def test_templates_of_the_papers_sources(family, text, answer, label, movable, rotated_text, rotated_answer):
    given = apply_template(record(text, answer), TEMPLATES, family=family, label=label)
    validate_contract(given)
    if movable is None:
        assert given.contract.answer is AnswerRule.NOT_PERMUTABLE
        assert not given.contract.permutable
        assert rotated_text in given.contract.reason
    else:
        assert given.contract.movable == movable
        moved_text, moved_answer = rotated(given)
        assert rotated_text in moved_text
        assert moved_answer == rotated_answer


def test_only_the_contract_is_given():
    wrong = PermutationContract((0, 7), (ReferenceRule.INDEX,), AnswerRule.ORDERING)
    original = replace(record("<image><image>\nHow many dogs are there?", "2"), contract=wrong, kind="counting")
    given = apply_template(original, TEMPLATES, family="mantis")
    assert given.contract.movable == (0, 1)
    assert replace(given, contract=wrong) == original


def test_unusable_records_are_errors():
    with pytest.raises(UserError, match="1 <image> placeholders for 2 images"):
        apply_template(replace(record("<image>", "2"), images=(Path("a"), Path("b"))), TEMPLATES, family="mantis")


def test_the_file_that_is_shipped_says_what_the_sources_need():
    assert {"nlvr2", "dreamsim", "iconqa", "showhowto_choice", "showhowto_ordering", "mantis"} < set(TEMPLATES.families)
    assert TEMPLATES.of("unheard of") == TEMPLATES.families["mantis"]
    assert DEFAULT_TEMPLATES.parent.parent.name == "data"
    assert "data/contract/*.yaml" in (Path(__file__).parents[3] / "setup.py").read_text()


def written(folder: Path, text: str) -> Path:
    path = folder / "templates.yaml"
    path.write_text(text)
    return path


def test_users_have_templates_of_their_own(tmp_path):
    own = "mine:\n- name: pairs\n  when: {images: 2, text: 'Pair'}\n  movable: all\n  answer: index\n"
    templates = load_templates(written(tmp_path, own))
    assert rotated(apply_template(record("<image><image>\nPair?", "2"), templates, family="mine"))[1] == "1"
    for text, family in (("Single?", "mine"), ("Pair?", "other")):
        given = apply_template(record(f"<image><image>\n{text}", "2"), templates, family=family)
        assert given.contract.reason == f"no template for '{family}' fits"


def test_the_first_template_that_fits_decides(tmp_path):
    own = (
        "mine:\n- {name: never, when: {text: closed}, answer: not_permutable, reason: it is closed}\n"
        "- {name: three, when: {images: 3}, movable: {last: 4}, answer: unchanged}\n"
        "- {name: all, movable: all, answer: unchanged}\n"
    )
    templates = load_templates(written(tmp_path, own))
    reasons = [
        apply_template(record(text, "20"), templates, family="mine").contract.reason
        for text in ("<image><image> closed", "<image><image><image>", "<image><image>")
    ]
    assert reasons == ["never: it is closed", "three: the last 4 of 3 images should move", ""]


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("mine:\n- name: a\n  movable: all\n  answr: index\n", 4, "answr"),
        ("mine:\n- name: a\n  movable: all\n  answer: indx\n", 4, "index"),
        ("mine:\n- name: a\n  movable: all\n  answer: index\n  when:\n    imges: 2\n", 6, "imges"),
        ("mine:\n- name: a\n  movable: all\n  answer: index\n  when:\n    text: '('\n", 6, "regular expression"),
        ("mine:\n- name: a\n  movable: most\n  answer: index\n", 3, "all_but_first"),
        ("mine:\n- name: a\n  movable: {last: 1}\n  answer: index\n", 3, "greater than or equal to 2"),
        ("mine:\n- name: a\n  answer: index\n", 2, "either images are movable"),
        ("mine:\n- name: a\n  answer: not_permutable\n", 2, "a reason goes with"),
        ("mine:\n- name: a\n  movable: all\n  answer: index\n  reason: none\n", 2, "a reason goes with"),
        ("mine:\n- name: a\n  movable: all\n  answer: option_letter\n", 2, "option_images goes with"),
        ("mine:\n- name: a\n  movable: options\n  option_images: in_order\n  answer: option_letter\n", 2, "need these"),
        ("mine:\n- movable: all\n  answer: index\n", 2, "name"),
        ("mine: 3\n", 1, "tuple"),
        ("- mine\n", None, "lists them by source"),
        ("mine: [\n", 2, "not valid YAML"),
    ],
)
def test_wrong_files_are_refused_with_their_line(tmp_path, text, line, complaint):
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=complaint) as refused:
        load_templates(path)
    assert refused.value.where == (str(path) if line is None else f"{path}:{line}")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_templates(tmp_path / "none.yaml")
