"""ReMI: 13 reasoning tasks of 200 questions each, over 2 to 6 images; the result is the mean over tasks."""

from __future__ import annotations

from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.fields import Fields
from perl_megatron.evaluation.benchmarks.item import Item

MAX_IMAGES = 6
FORMS = {
    "collisions": "If it is a yes-or-no question, answer 1 for yes and 0 for no.",
    "isomorphism": "Answer 1 if the two graphs are isomorphic, and 0 otherwise.",
}
"""Tasks whose labels have a form that their questions do not tell; the benchmark's own prompts do."""
RELATIVE = {"geomshape": 0.03, "geomcost": 0.03, "clocks": 0.0}
"""How far from the label a number may be, as a share of it; 1 % elsewhere."""
ABSOLUTE = {"clocks": 10.0}


def read(fields: Fields) -> Item:
    """``<image1>`` … stand in the question."""
    task, label = fields.text("task"), fields.text("label")
    name = task.casefold()
    text = "\n".join(part for part in (fields.text("question"), FORMS.get(name, "")) if part)
    return fields.item(
        fields.number_in(task),
        task,
        text,
        fields.images(fields.numbered("image_", MAX_IMAGES)),
        label,
        "one_of" if name == "refcoco" else "tolerant",
        placeholder=r"<image(\d+)>",
        relative_tolerance=RELATIVE.get(name, 0.01),
        absolute_tolerance=ABSOLUTE.get(name, 0.0),
    )


REMI = Benchmark(
    name="remi",
    title="ReMI",
    source="mehrankazemi/ReMI",
    split="test",
    num_items=2600,
    columns=("task", "question", "image_1", "label"),
    read=read,
    headline="macro",
)
