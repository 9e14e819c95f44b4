"""Mantis-Eval: 217 multiple-choice and short-answer questions over several images."""

from __future__ import annotations

import re

from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.fields import Fields
from perl_megatron.evaluation.benchmarks.item import Item


def read(fields: Fields) -> Item:
    """Options are appended as ' (A) …' unless they are lettered already; images without placeholder come first."""
    question, answer, options = fields.text("question"), fields.text("answer"), fields.texts("options")
    images = fields.images(fields.row.values["images"] or [])
    task = fields.optional("category") or fields.optional("data_source")
    if fields.text("question_type") == "short-answer":
        return fields.item(fields.text("id"), task, question, images, answer, "text")
    lines = [
        option if re.match(rf"\(?{letter}\s?[).:]", option) else f"({letter}) {option}"
        for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options, strict=False)
    ]
    text = "\n ".join((question, *lines))
    letter = fields.letter(answer, options)
    return fields.item(fields.text("id"), task, text, images, letter, "choice", options=options)


MANTIS_EVAL = Benchmark(
    name="mantis_eval",
    title="Mantis-Eval",
    source="TIGER-Lab/Mantis-Eval",
    split="test",
    num_items=217,
    columns=("id", "images", "question_type", "question", "options", "answer"),
    read=read,
    other_names=("mantis",),
)
