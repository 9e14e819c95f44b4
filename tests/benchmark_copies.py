"""Small copies of the eight benchmarks, in exactly the shapes in which they are published."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image


def picture(colour: int) -> bytes:
    """A PNG of one merged patch; another colour is another image."""
    content = io.BytesIO()
    Image.new("RGB", (28, 28), (colour % 256, 60, 200)).save(content, "PNG")
    return content.getvalue()


def embedded(colour: int) -> dict[str, Any]:
    """An image as `datasets` keeps it in a table."""
    return {"bytes": picture(colour), "path": f"{colour}.png"}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def write_json(path: Path, rows: Sequence[Mapping[str, Any]], images: Sequence[str] = ()) -> Path:
    """A JSON list with image files beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    for index, name in enumerate(images):
        file = path.parent / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(100 + index))
    return path


def mantis_eval(folder: Path) -> Path:
    rows = [
        {
            "id": "mantis_0",
            "images": [embedded(1), embedded(2)],
            "question_type": "multi-choice",
            "question": "Is <image> like the other?",
            "options": ["yes", "(B) no"],
            "answer": "A",
            "data_source": "made",
            "category": "comparison",
        },
        {
            "id": "mantis_1",
            "images": [embedded(1), embedded(3)],
            "question_type": "short-answer",
            "question": "<image> <image> What colour?",
            "options": [],
            "answer": "Blue",
            "data_source": "made",
            "category": "colour",
        },
    ]
    write_parquet(folder / "Mantis-Eval" / "mantis_eval" / "test-00000-of-00001.parquet", rows)
    return folder


def blink(folder: Path, tasks: Sequence[str] = ("Art_Style", "Counting"), per_task: int = 1) -> Path:
    for task in tasks:
        for split in ("val", "test"):
            rows = [
                {
                    "idx": f"{split}_{task}_{number}",
                    "sub_task": task,
                    "question": "Which one?",
                    "prompt": f"{task}, question {number}. Which one?\n(A) the first\n(B) the second",
                    "image_1": embedded(number),
                    "image_2": embedded(number + 50),
                    "image_3": None,
                    "image_4": None,
                    "choices": ["the first", "the second"],
                    "answer": "(B)" if split == "val" else "hidden",
                }
                for number in range(1, per_task + 1)
            ]
            write_parquet(folder / "BLINK" / task / f"{split}-00000-of-00001.parquet", rows)
    return folder


def mmiu(folder: Path) -> Path:
    letters = "\n".join(f"{chr(ord('A') + index)}: option {index}" for index in range(14))
    rows = [
        {
            "task": "person_reid",
            "question": "Who is it?",
            "options": "A: one\nB: two",
            "context": "Select from the following choices.\nA: one\nB: two",
            "input_image_path": ["./reid/0.png", "./reid/1.png"],
            "output": "B",
        },
        {
            "task": "visual_cloze",
            "question": "What fits?",
            "options": letters,
            "context": "Look at all images.",
            "input_image_path": [f"./cloze/{index}.png" for index in range(3)],
            "output": "N",
        },
        {
            "task": "visual_cloze",
            "question": "What fits here?",
            "options": "A: x\nB: y",
            "context": "Study every image.",
            "input_image_path": ["./cloze/missing.png"],
            "output": "A",
        },
    ]
    names = ["reid/0.png", "reid/1.png", "cloze/0.png", "cloze/1.png", "cloze/2.png"]
    write_json(folder / "MMIU-Benchmark" / "all.json", rows, names)
    return folder


def math_vista(folder: Path) -> Path:
    common: dict[str, Any] = {"image": "images/1.jpg", "unit": None, "precision": None, "choices": None}
    rows = [
        common
        | {
            "pid": "1",
            "question": "How high?",
            "decoded_image": embedded(1),
            "unit": "cm",
            "precision": 1.0,
            "answer": "1.2",
            "question_type": "free_form",
            "answer_type": "float",
            "query": "Hint: give one decimal.\nQuestion: How high? (Unit: cm)",
            "metadata": {"task": "figure question answering"},
        },
        common
        | {
            "pid": "2",
            "question": "Which letter?",
            "decoded_image": embedded(2),
            "choices": ["C", "A", "B"],
            "answer": "A",
            "question_type": "multi_choice",
            "answer_type": "text",
            "query": "Question: Which letter?\nChoices:\n(A) C\n(B) A\n(C) B",
            "metadata": {"task": "geometry problem solving"},
        },
    ]
    write_parquet(folder / "MathVista" / "data" / "testmini-00000-of-00001.parquet", rows)
    write_parquet(folder / "MathVista" / "data" / "test-00000-of-00001.parquet", [rows[0] | {"pid": "7", "answer": ""}])
    return folder


def math_verse(folder: Path) -> Path:
    rows = []
    for index, version in enumerate(("Text Dominant", "Vision Only")):
        choices = "Choices:\nA:30°\nB:40°"
        question = f"Find the angle.\n{choices}" if version == "Text Dominant" else ""
        rows.append(
            {
                "sample_index": str(index + 1),
                "problem_index": "1",
                "problem_version": version,
                "question": question,
                "image": embedded(index),
                "answer": "B",
                "question_type": "multi-choice",
                "query_cot": f"First reason, then answer with the letter.\n{question}",
                "question_for_eval": f"Find the angle.\n{choices}",
            }
        )
    rows.append(rows[0] | {"sample_index": "3", "problem_index": "2", "question_type": "free-form", "answer": "$12$"})
    write_parquet(folder / "MathVerse" / "testmini.parquet", rows)
    text_only = [row | {"sample_index": f"9{row['sample_index']}", "image": None} for row in rows]
    write_parquet(folder / "MathVerse" / "testmini_text_only.parquet", text_only)
    return folder


def math_vision(folder: Path) -> Path:
    rows = [
        {
            "id": "4",
            "question": "Which piece fits? <image1>",
            "options": ["A", "B", "C"],
            "image": "images/4.jpg",
            "decoded_image": embedded(4),
            "answer": "C",
            "level": 2,
            "subject": "combinatorics",
        },
        {
            "id": "5",
            "question": "How many?",
            "options": [],
            "image": "images/5.jpg",
            "decoded_image": embedded(5),
            "answer": "\\frac{1}{2}",
            "level": 3,
            "subject": "algebra",
        },
    ]
    write_parquet(folder / "MathVision" / "data" / "test-00000-of-00001.parquet", rows)
    write_parquet(folder / "MathVision" / "data" / "testmini-00000-of-00001.parquet", rows[:1])
    return folder


def remi(folder: Path) -> Path:
    def row(task: str, question: str, label: str, *colours: int) -> dict[str, Any]:
        images = {f"image_{number}": None for number in range(1, 7)}
        images |= {f"image_{number}": embedded(colour) for number, colour in enumerate(colours, start=1)}
        return {"task": task, "question": question, "label": label, **images}

    rows = [
        row("RefCoco", "Which of <image2> and <image1> is it?", "1,2", 1, 2),
        row("GeomShape", "<image1><image2> The area?", "100", 1, 3),
        row("Clocks", "From <image1> to <image2>?", "125", 4, 5),
        row("Isomorphism", "Are <image1> and <image2> isomorphic?", "1", 6, 7),
        row("Charts", "The mean in <image1>? Look at <image1> again.", "45%", 8),
    ]
    write_parquet(folder / "ReMI" / "data" / "test-00000-of-00001.parquet", rows)
    return folder


def mv_math(folder: Path) -> Path:
    def row(number: int, question: str, answer: str, kind: str, images: Sequence[str]) -> dict[str, Any]:
        names = {"problem_id": number, "question": question, "input_image": list(images), "is_multi_img": True}
        return names | {"answer": answer, "answer_type": kind, "subject": "Algebra", "image_relavance": "1"}

    rows = [
        row(1, "As in <image_1>:\nA. <image_2>\nB. <image_3>", "B", "choice", ("1_1.png", "1_2.png", "1_3.png")),
        row(2, "<image_1> and <image_2>: how high?", "17 m", "single-step", ("1_1.png", "1_2.png")),
        row(3, "<image_1> (1) a? (2) b?", "(1) $3$; (2) $\\frac{1}{2}$", "multi-step", ("1_3.png",)),
    ]
    write_json(folder / "MV-MATH" / "data" / "MV-MATH.json", rows)
    write_json(folder / "MV-MATH" / "data" / "MV-MATH-choice.json", rows[:1])
    for index in (1, 2, 3):
        file = folder / "MV-MATH" / "images" / f"1_{index}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(picture(index))
    return folder


WRITERS = {
    "mantis_eval": mantis_eval,
    "blink": blink,
    "mmiu": mmiu,
    "math_vista": math_vista,
    "math_verse": math_verse,
    "math_vision": math_vision,
    "remi": remi,
    "mv_math": mv_math,
}


def write_all(folder: Path) -> Path:
    for write in WRITERS.values():
        write(folder)
    return folder
