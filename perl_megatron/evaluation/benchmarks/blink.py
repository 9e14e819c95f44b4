"""BLINK: 14 visual perception tasks (validation split: 1,901 questions)."""

from __future__ import annotations

from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.fields import Fields
from perl_megatron.evaluation.benchmarks.item import Item

MAX_IMAGES = 4


def read(fields: Fields) -> Item:
    """Images first, then the prompt, which lists the choices."""
    images = fields.images(fields.numbered("image_", MAX_IMAGES))
    choices = fields.texts("choices")
    letter = fields.letter(fields.text("answer"), choices)
    task = fields.text("sub_task")
    return fields.item(fields.text("idx"), task, fields.text("prompt"), images, letter, "choice", options=choices)


BLINK = Benchmark(
    name="blink",
    title="BLINK",
    source="BLINK-Benchmark/BLINK",
    split="val",
    num_items=1901,
    columns=("idx", "sub_task", "prompt", "image_1", "choices", "answer"),
    read=read,
)
