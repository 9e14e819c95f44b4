"""A question of a benchmark: what is asked, and what decides whether a response is right."""

from __future__ import annotations

from dataclasses import dataclass

from perl_megatron.types import Record


@dataclass(frozen=True)
class Item:
    """One question. ``record.kind`` is the task that its result is reported under."""

    record: Record
    """What is asked; ``record.answer`` is the expected answer, ``record.grading`` has options, tolerances and unit."""
    scorer: str
    """Which of ``scoring.SCORERS`` or ``MATH_SCORERS`` decides."""
    precision: int | None = None
    """Decimals that a 'float' is rounded to; None: those of the expected answer."""
    cluster: str = ""
    """Names the question that several items are versions of; they are resampled together. '': this item alone."""
    problem: str | None = None
    """Why the question cannot be asked (a broken image, say): it counts as wrong, so that the denominator stays."""

    @property
    def id(self) -> str:
        """Unique in the benchmark."""
        return self.record.id

    @property
    def task(self) -> str:
        """The task, subject or version that results are reported by."""
        return self.record.kind
