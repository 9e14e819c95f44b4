"""MathVision (test: 3,040 questions): competition mathematics with a picture."""

from __future__ import annotations

from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.fields import Fields
from perl_megatron.evaluation.benchmarks.item import Item


def read(fields: Fields) -> Item:
    """The question with its options, ``<image1>`` in its place; the answer is a letter where there are options."""
    question, answer, options = fields.text("question"), fields.text("answer"), fields.texts("options")
    images = fields.images([fields.row.values["decoded_image"]])
    lines = [f"({chr(ord('A') + index)}) {option}" for index, option in enumerate(options)]
    return fields.item(
        fields.text("id"),
        fields.text("subject"),
        "\n".join((question, *lines)),
        images,
        fields.letter(answer, options) if options else answer,
        "choice" if options else "math",
        options=options,
        placeholder=r"<image(\d+)>",
    )


MATH_VISION = Benchmark(
    name="math_vision",
    title="MathVision",
    source="MathLLMs/MathVision",
    split="test",
    num_items=3040,
    columns=("id", "question", "options", "decoded_image", "answer", "subject"),
    read=read,
)
