"""A question on its way through the stages, and what each stage says about one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from perl_megatron.errors import UserError
from perl_megatron.preparation.choices import with_options
from perl_megatron.types import IMAGE_PLACEHOLDER, Grading, Record


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OrderLabel:
    """What a language model says about the order of a question's images."""

    should_change: bool
    """Whether another order can change the right answer."""
    is_multichoice_images: bool
    """Whether the options are the images themselves."""


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Question:
    """One question over images; stages fill in the later fields one after another."""

    id: str
    source: str
    """The table and row that it comes from."""
    images: tuple[str, ...]
    """Paths relative to the pipeline's folder, in slot order."""
    image_sizes: tuple[tuple[int, int], ...]
    """(width, height) of each image in pixels."""
    text: str
    """With one ``<image>`` for each image, and without the options."""
    options: tuple[str, ...]
    """Texts of the options A, B, …; none where the question is open."""
    answer: str
    """The letter of the right option, or an open question's answer."""
    question_type: str = ""
    """'ReferenceComparison' or 'Other' where the question was rephrased."""
    accuracy: float | None = None
    """Share of the policy's responses that were right."""
    label: OrderLabel | None = None

    @property
    def is_choice(self) -> bool:
        """Whether it has options."""
        return bool(self.options)

    def full_text(self) -> str:
        """The question as it is asked, its options each on a line."""
        return with_options(self.text, self.options)

    def record(self, folder: Path) -> Record:
        """As a record of a dataset in ``folder``, without a contract: it does not say that images may move."""
        shows_images = any(IMAGE_PLACEHOLDER in option for option in self.options)
        return Record(
            id=self.id,
            images=tuple(folder / image for image in self.images),
            text=self.full_text(),
            answer=self.answer,
            answer_type="choice" if self.is_choice else "text",
            grading=Grading(options=() if shows_images else self.options),
            kind=self.question_type or ("choice" if self.is_choice else "open"),
            source=self.source,
        )


@dataclass(frozen=True)
class Kept:
    """The question as the stage leaves it."""

    question: Question
    raw: dict[str, Any] | None = None
    """What the stage's file of raw outputs gets, such as all responses."""


@dataclass(frozen=True)
class Dropped:
    """A question that the stage leaves out for good."""

    id: str
    source: str
    reason: str
    """One of few wordings, to be counted."""
    detail: str = ""
    """What is special about this one."""
    raw: dict[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Unanswered:
    """A question that was not decided, because an endpoint did not answer; the next run asks again."""

    id: str
    reason: str


Outcome = Kept | Dropped | Unanswered

_questions: TypeAdapter[Question] = TypeAdapter(Question)
to_values: Callable[[Question], dict[str, Any]] = _questions.dump_python


def from_values(values: dict[str, Any], *, where: str) -> Question:
    """A line of a stage's file as a question. UserError for one that another version has written."""
    try:
        return _questions.validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"not a question of this version: {first['loc']}: {first['msg']}", where=where, fix="use another folder"
        ) from error
