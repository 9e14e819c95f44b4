"""MMIU: 52 multi-image tasks, 11,698 multiple-choice questions over 2 to 32 images."""

from __future__ import annotations

from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.extraction import split_options, without_letter
from perl_megatron.evaluation.benchmarks.fields import Fields
from perl_megatron.evaluation.benchmarks.item import Item


def read(fields: Fields) -> Item:
    """Images first, then context and question so that the options come last, wherever the row has them."""
    question, context = fields.text("question"), fields.optional("context")
    listed = fields.row.values.get("options")
    if isinstance(listed, list | tuple):
        options = tuple(without_letter(option, index) for index, option in enumerate(fields.texts("options")))
        option_text = "\n".join(f"{chr(ord('A') + index)}: {option}" for index, option in enumerate(options))
    else:
        option_text = fields.optional("options")
        options = split_options(option_text) or split_options(context)
    if options and split_options(context) == options:
        parts = [question, context]
    elif options and split_options(question) == options:
        parts = [context, question]
    else:
        parts = [context, question, option_text]
    images = fields.images(fields.row.values["input_image_path"] or [])
    task = fields.text("task")
    letter = fields.letter(fields.text("output"), options)
    text = "\n".join(part for part in parts if part)
    return fields.item(fields.number_in(task), task, text, images, letter, "choice", options=options)


MMIU = Benchmark(
    name="mmiu",
    title="MMIU",
    source="FanqingM/MMIU-Benchmark",
    split="test",
    num_items=11698,
    columns=("task", "question", "options", "input_image_path", "output"),
    read=read,
)
