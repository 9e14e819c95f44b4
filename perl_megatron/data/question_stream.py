"""The questions in the order of the sampler, with what cannot be asked found before it is.

Large datasets are not decoded at load. Their questions are checked as they are drawn, while the images of those to come
are decoded by other processes; what cannot be asked is named, counted and passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl_megatron.data.records import DroppedRecord, too_many_dropped
from perl_megatron.data.sampler import MixtureSampler, ShuffledSampler
from perl_megatron.runtime import collective
from perl_megatron.types import Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamedQuestion:
    """A record that was drawn."""

    record: Record
    draw_index: int
    """How many had been drawn before it."""
    problem: str | None
    """Why it cannot be asked; None where it can."""


@dataclass(frozen=True)
class LookAhead:
    """Who prepares the questions to come.

    Attributes:
        expect: is told the images that will be needed next, in their order.
        num_questions: how many questions beyond those that are drawn: a step's. Else the few that a step draws again
            would leave the next step's images to the next step.
    """

    expect: Callable[[Iterable[Path]], None]
    num_questions: int


@dataclass(frozen=True)
class DrawChecks:
    """What happens to questions that were not checked at load.

    Attributes:
        problem_of: why a record cannot be asked (an image that cannot be read, a prompt that is too long), or None.
        max_corrupt_fraction: share of the records that may have a problem.
        where: the dataset, for the error when there are more.
    """

    problem_of: Callable[[Record], str | None]
    max_corrupt_fraction: float
    where: str


class QuestionStream:
    """Draws questions; every rank draws the same ones.

    Args:
        records: all of them.
        sampler: over the records' indices.
        checks: None where every record is known to be good.
        look_ahead: None where nothing has to be prepared.
    """

    def __init__(
        self,
        records: Sequence[Record],
        sampler: ShuffledSampler | MixtureSampler,
        checks: DrawChecks | None = None,
        look_ahead: LookAhead | None = None,
    ):
        self.records, self.sampler, self._checks, self._look_ahead = records, sampler, checks, look_ahead
        self._problems: dict[int, str] = {}
        self._coming: dict[int, tuple[Path, ...]] = {}

    @property
    def num_records(self) -> int:
        """Number of records, with those that cannot be asked."""
        return len(self.records)

    @property
    def num_drawn(self) -> int:
        """Questions drawn so far, with those that could not be asked."""
        return self.sampler.num_drawn

    def next(self, count: int, *, limit: int | None = None) -> list[StreamedQuestion]:
        """The next ``count`` questions that can be asked, and those between them that cannot.

        Args:
            count: 0 or more.
            limit: at most so many questions are drawn, whether they can be asked or not.

        Raises:
            UserError: too many records cannot be asked, on all ranks together.
        """
        drawn: list[StreamedQuestion] = []
        while True:
            missing = count - sum(one.problem is None for one in drawn)
            if limit is not None:
                missing = min(missing, limit - len(drawn))
            if missing <= 0:
                return drawn
            self._expect(missing, count)
            first = self.sampler.num_drawn
            indices = self.sampler.next(missing)
            records = [self.records[index] for index in indices]
            if self._checks is not None:
                self._check(indices, records, self._checks)
            drawn += [
                StreamedQuestion(record, first + number, self._problems.get(index))
                for number, (index, record) in enumerate(zip(indices, records, strict=True))
            ]

    def prepare(self) -> None:
        """Let the images of the first questions be decoded, before they are drawn."""
        self._expect(0, 0)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's position; JSON-serialisable."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``. Raises UserError if it was saved for other data or another seed."""
        self.sampler.load_state_dict(state)

    def _expect(self, missing: int, count: int) -> None:
        """Images of the ``missing`` questions that are drawn now, and of as many as are drawn later."""
        if self._look_ahead is not None:
            indices = self.sampler.peek(missing + max(count, self._look_ahead.num_questions))
            coming = [index for index in indices if index not in self._problems]
            # Records that lie in files are not read again for every call.
            known = self._coming
            self._coming = {index: known[index] if index in known else self.records[index].images for index in coming}
            self._look_ahead.expect(image for index in coming for image in self._coming[index])

    def _check(self, indices: Sequence[int], records: Sequence[Record], checks: DrawChecks) -> None:
        """Find the problems of drawn records. A problem that one rank meets is a problem of all."""
        found: dict[int, str] = {}
        for index, record in zip(indices, records, strict=True):
            if index not in self._problems and index not in found:
                problem = checks.problem_of(record)
                if problem is not None:
                    found[index] = problem
        for problems in collective.gather_objects(found):
            for index, problem in problems.items():
                if index not in self._problems:
                    self._problems[index] = problem
                    if collective.rank() == 0:
                        logger.warning("dropped %s", self._dropped(index))
        num_records = len(self.records)
        if len(self._problems) > checks.max_corrupt_fraction * num_records or len(self._problems) == num_records:
            dropped = [self._dropped(index) for index in self._problems]
            raise too_many_dropped(
                checks.where, dropped, num_records=num_records, max_corrupt_fraction=checks.max_corrupt_fraction
            )

    def _dropped(self, index: int) -> DroppedRecord:
        record = self.records[index]
        return DroppedRecord(record.source, record.id, self._problems[index])
