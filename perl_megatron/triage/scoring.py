"""Every log-probability of the reference, computed once: by precision, weights, hypothesis and rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from perl_megatron.triage.cases import Case
from perl_megatron.triage.gaps import Tolerance, gap
from perl_megatron.triage.hypotheses import RIGHT, Hypothesis
from perl_megatron.triage.policies import Policy, whole
from perl_megatron.triage.reference import Distribution, Precision, Reference, Scores

EXACT: dict[Precision, Precision] = {"float32": "float64", "bfloat16": "float32", "float8": "float32"}
"""In what the rounding of a precision is measured."""


@dataclass(frozen=True)
class Party:
    """Whose log-probabilities are judged."""

    name: Literal["engine", "trainer"]
    policy: Policy
    """The weights that it should have had."""
    precision: Precision
    """That it should compute in."""
    members: tuple[int, ...]
    """Cases that it has log-probabilities of."""

    def recorded(self, case: Case) -> np.ndarray:
        """Its log-probabilities, float64 [R]."""
        values = case.rollout.logprob_rollout if self.name == "engine" else case.rollout.logprob_old
        assert values is not None, "a member has them"
        return values

    def of(self, scores: Scores) -> np.ndarray:
        """The reference's for it, float64 [R, K]."""
        return scores.engine if self.name == "engine" else scores.trainer


class References:
    """The reference in every precision that is asked for; two at most are in memory.

    Args:
        model_path: the Hugging Face folder that describes the model.
        weights_dtype: of the weights in the run.
        distribution: of the sampling.
    """

    def __init__(self, model_path: Path, *, weights_dtype: torch.dtype, distribution: Distribution):
        self._model_path, self._weights_dtype, self._distribution = model_path, weights_dtype, distribution
        self._open: dict[Precision, Reference] = {}

    def __getitem__(self, precision: Precision) -> Reference:
        if precision not in self._open:
            while len(self._open) > 1:
                self._open.pop(next(iter(self._open)))
            self._open[precision] = Reference(
                self._model_path,
                precision=precision,
                weights_dtype=self._weights_dtype,
                distribution=self._distribution,
            )
        return self._open[precision]


class Scoring:
    """Log-probabilities and gaps of all cases, for engine and trainer alike."""

    def __init__(self, cases: Sequence[Case], references: References):
        self.cases, self._references = cases, references
        self._known: dict[tuple[Precision, int, str, int], Scores | None] = {}

    def gaps(self, party: Party, hypothesis: Hypothesis, index: int) -> np.ndarray | None:
        """float64 [R]: of one case to the exact reference; None where the hypothesis changes nothing of it."""
        scores = self._scores(party.policy, EXACT[party.precision], hypothesis, index)
        return None if scores is None else gap(party.recorded(self.cases[index]), party.of(scores))

    def errors(self, party: Party, precision: Precision) -> list[np.ndarray]:
        """float64 [R] for each member: what the reference itself loses in ``precision``."""
        return [
            gap(self._right(party, precision, index)[:, 0], self._right(party, EXACT[precision], index))
            for index in party.members
        ]

    def tolerance(self, party: Party, precision: Precision) -> Tolerance:
        """What rounding in ``precision`` allows the party."""
        exact = np.concatenate([self._right(party, EXACT[precision], index)[:, 0] for index in party.members])
        largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
        return Tolerance(self.errors(party, precision), largest=largest)

    def _right(self, party: Party, precision: Precision, index: int) -> np.ndarray:
        scores = self._scores(party.policy, precision, RIGHT, index)
        assert scores is not None, "the right input is always there"
        return party.of(scores)

    def _scores(self, policy: Policy, precision: Precision, hypothesis: Hypothesis, index: int) -> Scores | None:
        key = precision, id(policy), hypothesis.name, index
        if key not in self._known:
            plain = self.cases[index].plain
            inputs = plain if hypothesis.change is None else hypothesis.change(self.cases[index])
            self._known[key] = None
            if inputs is not None:
                reference = self._references[precision]
                reference.use(hypothesis.mix or whole(policy))
                self._known[key] = reference.score(inputs)
        return self._known[key]
