"""MV-MATH: 2,009 school problems over 2 to 8 images: multiple choice, one answer, or several steps."""

from __future__ import annotations

from perl_megatron.errors import UserError
from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.extraction import split_options
from perl_megatron.evaluation.benchmarks.fields import Fields
from perl_megatron.evaluation.benchmarks.item import Item

SCORERS = {"choice": "choice", "single-step": "math", "multi-step": "steps"}


def read(fields: Fields) -> Item:
    """``<image_1>`` … stand in the question, which also lists the options of a choice."""
    question, answer, kind = fields.text("question"), fields.text("answer"), fields.text("answer_type")
    if kind not in SCORERS:
        what = f"answer_type {kind!r} is none of {', '.join(SCORERS)}"
        raise UserError(what, where=fields.row.where, fix="give the benchmark's own table")
    options = split_options(question) if kind == "choice" else ()
    return fields.item(
        fields.text("problem_id"),
        kind,
        question,
        fields.images(fields.row.values["input_image"] or []),
        fields.letter(answer, options) if kind == "choice" else answer,
        SCORERS[kind],
        options=options,
        placeholder=r"<image_(\d+)>",
    )


MV_MATH = Benchmark(
    name="mv_math",
    title="MV-MATH",
    source="PeijieWang/MV-MATH",
    split="test",
    num_items=2009,
    columns=("problem_id", "question", "input_image", "answer", "answer_type"),
    read=read,
)
