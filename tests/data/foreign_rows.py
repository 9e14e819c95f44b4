"""Rows in the shapes of the datasets that are imported, and the files that hold them."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (28, 28), shade).save(content, "PNG")
    return content.getvalue()


def embedded(shade: int) -> dict[str, Any]:
    """An image as Hugging Face's parquet files hold it."""
    return {"bytes": png(shade), "path": None}


MANTIS = [
    {
        "id": "nlvr2_1",
        "images": [embedded(1), embedded(2)],
        "conversation": [
            {"role": "user", "content": "<image> <image>\nIs it true? (A) True (B) False"},
            {"role": "assistant", "content": "B"},
            {"role": "user", "content": "How many dogs are there?"},
            {"role": "assistant", "content": "3"},
        ],
        "source": "nlvr2",
    },
    {
        "id": "iconqa_7",
        "images": [embedded(3)],
        "conversation": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}],
        "source": "iconqa",
    },
]
MMK12 = [
    {
        "id": 17,
        "question": "<image>\nFind the area.",
        "answer": "$\\frac{3}{4}$",
        "subject": "math",
        "image": embedded(4),
    }
]
VERL = [
    {
        "data_source": "hiyouga/geometry3k",
        "prompt": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "<image><image>How many degrees?"},
        ],
        "images": [embedded(5), embedded(6)],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "48"},
        "extra_info": {"split": "train", "index": 3, "answer": "48", "question": "How many degrees?"},
    }
]
EASYR1 = [{"images": [embedded(7)], "problem": "<image>Which one?", "answer": "2.5"}]
PLAIN = [
    {"question_id": "p1", "question": "Which?", "images": ["scans/a.png", "scans/b.png"], "answer": "the cat",
     "options": ["the cat", "the dog"], "dataset": "pets", "category": "animals"},
    {"question_id": "p2", "question": "<image> How many?", "image": "scans/a.png", "answer": 4},
]  # fmt: skip


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_scans(folder: Path) -> None:
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate("ab"):
        (folder / "scans" / f"{name}.png").write_bytes(png(shade))
