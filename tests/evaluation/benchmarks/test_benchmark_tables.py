"""Each benchmark's local copy becomes items: prompt, images in their places, options, expected answer, scorer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import benchmark_copies
import pytest

from perl_megatron.data.image_store import ImageStore
from perl_megatron.errors import UserError
from perl_megatron.evaluation.benchmarks.benchmark import find_copy, load_items
from perl_megatron.evaluation.benchmarks.fields import place_images
from perl_megatron.evaluation.benchmarks.item import Item
from perl_megatron.evaluation.benchmarks.registry import BENCHMARKS, local_copies
from perl_megatron.evaluation.benchmarks.scoring import score
from perl_megatron.types import IMAGE_PLACEHOLDER, Grading


@pytest.fixture
def load(tmp_path):
    """Writes a benchmark's copy, finds it and loads its items."""

    def items_of(name: str) -> dict[str, Item]:
        benchmark = BENCHMARKS[name]
        benchmark_copies.WRITERS[name](tmp_path / "copies")
        path = find_copy(benchmark, tmp_path / "copies")
        assert path is not None
        return {item.id: item for item in load_items(benchmark, path, ImageStore(tmp_path / "images"))}

    return items_of


def colours(item: Item) -> list[bytes]:
    return [path.read_bytes() for path in item.record.images]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_items_are_whole(load, name):
    """One placeholder for each image, files that exist, an answer that its own scorer takes for right."""
    for item in load(name).values():
        if item.problem is None:
            record = item.record
            assert record.text.count(IMAGE_PLACEHOLDER) == len(record.images) >= 1
            assert all(path.is_file() for path in record.images)
            answer = record.answer.split(",")[0] if item.scorer == "one_of" else record.answer
            assert score(f"<think>x</think> \\boxed{{{answer}}}", item).correct, record
            assert not score("<think>x</think> \\boxed{something else}", item).correct


def test_mantis_eval(load):
    items = load("mantis_eval")
    choice, short = items["mantis_0"], items["mantis_1"]
    assert choice.record.text == "<image>\nIs <image> like the other?\n (A) yes\n (B) no"
    assert choice.record.grading == Grading(options=("yes", "no"))
    assert (choice.scorer, choice.record.answer, choice.task) == ("choice", "A", "comparison")
    assert colours(choice) == [benchmark_copies.picture(1), benchmark_copies.picture(2)]
    assert short.record.text == "<image> <image> What colour?"
    assert (short.scorer, short.record.answer) == ("text", "Blue")
    assert choice.record.images[0] == short.record.images[0]  # the same picture is kept once


def test_blink(load):
    items = load("blink")
    assert set(items) == {"val_Art_Style_1", "val_Counting_1"}  # not the test split, whose answers are hidden
    item = items["val_Counting_1"]
    assert item.record.text == "<image><image>\nCounting, question 1. Which one?\n(A) the first\n(B) the second"
    assert (item.task, item.record.answer, len(item.record.images)) == ("Counting", "B", 2)


def test_mmiu(load):
    items = load("mmiu")
    assert set(items) == {"person_reid/0", "visual_cloze/0", "visual_cloze/1"}
    reid, cloze, missing = items.values()
    assert reid.record.text == "<image><image>\nWho is it?\nSelect from the following choices.\nA: one\nB: two"
    assert cloze.record.text.startswith("<image><image><image>\nLook at all images.\nWhat fits?\nA: option 0\nB:")
    assert cloze.record.text.endswith("\nN: option 13")
    assert cloze.record.answer == "N"
    assert score("\\boxed{n}", cloze).correct
    assert not score("\\boxed{O}", cloze).correct
    assert missing.record.text == "Study every image.\nWhat fits here?\nA: x\nB: y"
    assert missing.problem == "the image file ./cloze/missing.png is missing"


def test_math_vista(load):
    items = load("math_vista")
    assert set(items) == {"1", "2"}  # not the test split
    number, choice = items.values()
    assert number.record.text == "<image>\nHint: give one decimal.\nQuestion: How high? (Unit: cm)"
    assert (number.scorer, number.precision, number.record.grading.unit) == ("float", 1, "cm")
    assert (choice.record.answer, choice.task) == ("B", "geometry problem solving")  # the letter of the choice 'A'


def test_math_verse(load):
    items = load("math_verse")
    assert set(items) == {"1", "2", "3"}  # not the versions without image
    first, vision_only, free = items.values()
    assert (
        first.record.text
        == "<image>\nFirst reason, then answer with the letter.\nFind the angle.\nChoices:\nA:30°\nB:40°"
    )
    assert (first.task, vision_only.task) == ("Text Dominant", "Vision Only")
    assert first.cluster == vision_only.cluster == "1"
    assert vision_only.record.grading.options == ("30°", "40°")
    assert score("\\boxed{40^\\circ}", vision_only).correct is False
    assert score("\\boxed{40°}", vision_only).correct
    assert (free.scorer, free.cluster) == ("math", "2")


def test_math_vision(load):
    items = load("math_vision")
    piece, number = items.values()
    assert piece.record.text == "Which piece fits? <image>\n(A) A\n(B) B\n(C) C"
    assert (piece.scorer, number.scorer) == ("choice", "math")
    assert number.record.text == "<image>\nHow many?"
    assert score("\\boxed{0.5}", number).correct


def test_remi(load):
    refcoco, geometry, clocks, graphs, charts = load("remi").values()
    assert refcoco.record.text == "Which of <image> and <image> is it?"
    assert colours(refcoco) == [benchmark_copies.picture(2), benchmark_copies.picture(1)]  # as the text names them
    assert refcoco.scorer == "one_of"
    assert geometry.record.grading.relative_tolerance == 0.03
    assert (clocks.record.grading.absolute_tolerance, clocks.record.grading.relative_tolerance) == (10.0, 0.0)
    assert graphs.record.text.endswith("isomorphic?\nAnswer 1 if the two graphs are isomorphic, and 0 otherwise.")
    assert charts.record.text == "The mean in <image>? Look at image 1 again."
    assert score("\\boxed{45.4}", charts).correct
    assert not score("\\boxed{46}", charts).correct
    assert BENCHMARKS["remi"].headline == "macro"


def test_mv_math(load, caplog):
    caplog.set_level(logging.INFO)
    items = load("mv_math")
    assert set(items) == {"1", "2", "3"}
    assert "1 rows repeat others" in caplog.text  # the choices have a file of their own, too
    choice, single, steps = items.values()
    assert choice.record.text == "As in <image>:\nA. <image>\nB. <image>"
    assert [item.scorer for item in items.values()] == ["choice", "math", "steps"]
    assert score("\\boxed{17}", single).correct
    assert score("\\boxed{3} and \\boxed{0.5}", steps).correct
    assert not score("\\boxed{3} and \\boxed{0.6}", steps).correct


def test_json_lines_are_read_like_the_list(tmp_path):
    benchmark_copies.mmiu(tmp_path)
    file = tmp_path / "MMIU-Benchmark" / "all.json"
    lines = "".join(json.dumps(row) + "\n" for row in json.loads(file.read_text()))
    as_list = load_items(BENCHMARKS["mmiu"], file, ImageStore(tmp_path / "images"))
    file.with_suffix(".jsonl").write_text(lines)
    file.unlink()
    as_lines = load_items(BENCHMARKS["mmiu"], file.parent, ImageStore(tmp_path / "images"))
    assert [item.record.text for item in as_lines] == [item.record.text for item in as_list]


def test_another_table_is_refused(tmp_path):
    benchmark_copies.blink(tmp_path)
    with pytest.raises(UserError, match=r"no table of ReMI: it has no column task, label"):
        load_items(BENCHMARKS["remi"], tmp_path / "BLINK" / "Counting", ImageStore(tmp_path / "images"))


def test_two_questions_with_one_id_are_refused(tmp_path):
    benchmark_copies.mv_math(tmp_path)
    file = tmp_path / "MV-MATH" / "data" / "MV-MATH-choice.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[0] | {"answer": "A"}]))
    with pytest.raises(UserError, match="two different questions have the id '1'"):
        load_items(BENCHMARKS["mv_math"], tmp_path / "MV-MATH", ImageStore(tmp_path / "images"))


def test_questions_that_cannot_be_asked_stay(tmp_path):
    """A broken image, a path out of the folder, an answer without option, a placeholder without image."""

    def row(**changes: object) -> dict[str, object]:
        question = {"problem_id": len(rows), "question": "<image_1> (A) x (B) y", "input_image": ["a.png"]}
        return question | {"answer": "A", "answer_type": "choice"} | changes

    rows: list[dict[str, object]] = []
    rows.append(row())
    rows.append(row(input_image=["../../secret.png"]))
    rows.append(row(answer="C"))
    rows.append(row(question="<image_2> (A) x (B) y"))
    rows.append(row(input_image=[]))
    rows.append(row(question="<image_1> <image> (A) x (B) y"))
    file = benchmark_copies.write_json(tmp_path / "mv_math.json", rows, ["a.png"])
    items = load_items(BENCHMARKS["mv_math"], file, ImageStore(tmp_path / "images"))
    assert [item.problem for item in items] == [
        None,
        "the image path '../../secret.png' leaves the table's folder",
        "the answer 'C' is none of its 2 options",
        "its text names image 2 of 1",
        "its text names image 1 of 0",
        "its text holds <image>, which stands for no image",
    ]


def test_place_images_without_numbers():
    images = tuple(Path(name) for name in "abc")
    assert place_images("x <image> y", images, IMAGE_PLACEHOLDER) == ("<image><image>\nx <image> y", images)
    assert place_images("<image> y", images, IMAGE_PLACEHOLDER) == ("<image><image><image> y", images)
    with pytest.raises(UserError, match="2 <image> for 1 images"):
        place_images("<image><image>", images[:1], IMAGE_PLACEHOLDER)


def test_place_images_by_number():
    images = tuple(Path(name) for name in "abc")
    text, order = place_images("<image3> before <image1>; <image3> after", images, r"<image(\d+)>")
    assert text == "<image><image> before <image>; image 2 after"
    assert [path.name for path in order] == ["b", "c", "a"]


def test_local_copies(tmp_path):
    benchmark_copies.write_all(tmp_path)
    assert set(local_copies(("all",), tmp_path)) == set(BENCHMARKS)
    assert local_copies(("remi", "blink"), tmp_path) == {"remi": tmp_path / "ReMI", "blink": tmp_path / "BLINK"}


def test_what_is_missing_is_said(tmp_path):
    benchmark_copies.blink(tmp_path)
    with pytest.raises(UserError) as error:
        local_copies(("blink", "mmiu"), tmp_path)
    assert "no copy of mmiu; the folder holds BLINK" in str(error.value)
    assert "FanqingM/MMIU-Benchmark" in str(error.value)
    assert set(local_copies(("all",), tmp_path)) == {"blink"}
    with pytest.raises(UserError, match="the benchmark mnist is unknown"):
        local_copies(("mnist",), tmp_path)
    with pytest.raises(UserError, match="no folder with benchmarks"):
        local_copies(("blink",), None)
    with pytest.raises(UserError, match="does not exist"):
        local_copies(("blink",), tmp_path / "nowhere")


def test_a_folder_without_the_split(tmp_path):
    benchmark_copies.blink(tmp_path)
    for file in (tmp_path / "BLINK").rglob("val-*"):
        file.unlink()
    with pytest.raises(UserError, match="no table of the split 'val'"):
        load_items(BENCHMARKS["blink"], tmp_path / "BLINK", ImageStore(tmp_path / "images"))
