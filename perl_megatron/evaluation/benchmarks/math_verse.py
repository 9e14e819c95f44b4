"""MathVerse (testmini: 788 problems in 5 versions): how much a model reads from the diagram."""

from __future__ import annotations

from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.extraction import split_options
from perl_megatron.evaluation.benchmarks.fields import Fields
from perl_megatron.evaluation.benchmarks.item import Item


def read(fields: Fields) -> Item:
    """The table's ``query_cot`` (instruction and question); the versions of a problem are one cluster."""
    text = fields.text("query_cot", "question")
    images, answer = fields.images([fields.row.values["image"]]), fields.text("answer")
    place = fields.text("sample_index"), fields.text("problem_version")
    cluster = fields.text("problem_index")
    if fields.text("question_type") != "multi-choice":
        return fields.item(*place, text, images, answer, "math", cluster=cluster)
    sources = (fields.optional("question_for_eval"), fields.optional("question"), text)
    options = next((found for source in sources if (found := split_options(source))), ())
    letter = fields.letter(answer, options)
    return fields.item(*place, text, images, letter, "choice", options=options, cluster=cluster)


MATH_VERSE = Benchmark(
    name="math_verse",
    title="MathVerse",
    source="AI4Math/MathVerse",
    split="testmini",
    num_items=3940,
    columns=("sample_index", "problem_index", "problem_version", "question", "image", "answer", "question_type"),
    read=read,
    without=frozenset(("text", "only")),
)
