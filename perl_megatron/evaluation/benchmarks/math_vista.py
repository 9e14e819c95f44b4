"""MathVista (testmini: 1,000 questions): mathematics in pictures, charts and figures."""

from __future__ import annotations

from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.fields import Fields
from perl_megatron.evaluation.benchmarks.item import Item


def read(fields: Fields) -> Item:
    """The table's own ``query``: a hint on the answer's form, the question, its unit and choices."""
    metadata = fields.row.values.get("metadata")
    task = str(metadata.get("task") or "") if isinstance(metadata, dict) else ""
    task, text = task or fields.text("question_type"), fields.text("query", "question")
    images, answer = fields.images([fields.row.values["decoded_image"]]), fields.text("answer")
    if fields.text("question_type") == "multi_choice":
        choices = fields.texts("choices")
        letter = _letter(fields, answer, choices)
        return fields.item(fields.text("pid"), task, text, images, letter, "choice", options=choices)
    precision = fields.row.values.get("precision")
    return fields.item(
        fields.text("pid"),
        task,
        text,
        images,
        answer,
        fields.text("answer_type"),
        unit=fields.optional("unit"),
        precision=int(precision) if precision is not None and precision == precision else None,
    )


def _letter(fields: Fields, answer: str, choices: tuple[str, ...]) -> str:
    """The answer is the text of a choice, also where that text is a letter."""
    return chr(ord("A") + choices.index(answer)) if answer in choices else fields.letter(answer, choices)


MATH_VISTA = Benchmark(
    name="math_vista",
    title="MathVista",
    source="AI4Math/MathVista",
    split="testmini",
    num_items=1000,
    columns=("pid", "question", "decoded_image", "choices", "answer", "question_type", "answer_type"),
    read=read,
)
