"""The reward of many responses: the rules' parts, a judge's, and those of a user's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perl_megatron.config.reward_section import RewardConfig
from perl_megatron.config.schema import Config
from perl_megatron.reward.functions import load_functions
from perl_megatron.reward.grade import final_answer
from perl_megatron.reward.judge import Case, Judge
from perl_megatron.reward.math_equivalence import MAX_LENGTH, compare_all, math_equal
from perl_megatron.reward.score import readable, score
from perl_megatron.runtime.environment import cores_of_this_process
from perl_megatron.types import View

MAX_AT_ONCE = 8
"""Mathematical comparisons; each takes a core."""


@dataclass(frozen=True)
class Response:
    """What a reward is given for."""

    text: str
    view: View
    """The question in the image order that the response answers, with its own answer."""
    finish_reason: str
    """'stop' or 'length'."""


@dataclass(frozen=True)
class Scored:
    """The reward parts of one response, by name (``score.weights``)."""

    parts: dict[str, float]
    readable: bool
    """Whether the response holds an answer of the view's type, right or wrong (``score.readable``)."""


class Scorer:
    """Scores the responses of a step together, so that slow parts work side by side. To be closed.

    Raises:
        UserError: a reward function cannot be loaded, or the judge's endpoint cannot be used.
    """

    def __init__(self, config: Config):
        self._config = config.reward
        self._functions = load_functions(config.reward)
        self._judge = Judge(config.judge, config.reward.judge_failure) if config.reward.judge > 0 else None

    def score_all(self, responses: Sequence[Response]) -> list[Scored]:
        """All parts of each response, those of weight 0 too; the judge's only where it has a weight.

        Raises:
            UserError: a record's answer cannot be read as its answer type; a reward function fails; the judge gives no
                verdict (`reward.judge_failure`).
        """
        scored = []
        by_rules = rule_parts(responses, self._config)
        judged = self._judged(responses, [parts["accuracy"] for parts in by_rules])
        for response, parts, verdict in zip(responses, by_rules, judged, strict=True):
            if self._judge is not None:
                parts["judge"] = verdict
            for function in self._functions:
                parts[function.name] = function(response.text, response.view, response.finish_reason)
            scored.append(Scored(parts, readable(response.text, response.view)))
        return scored

    def close(self) -> None:
        """Let go of the judge's connections."""
        if self._judge is not None:
            self._judge.close()

    def _judged(self, responses: Sequence[Response], accuracies: Sequence[float]) -> list[float]:
        """The accuracy, or what the judge says of an answer that the rules could not be expected to know."""
        parts = list(accuracies)
        if self._judge is None:
            return parts
        cases: dict[int, Case] = {}
        for index, response in enumerate(responses):
            if accuracies[index] < 1 and response.view.answer_type in self._config.judge_types:
                given = final_answer(response.text, response.view.answer_type)
                if given is not None and readable(response.text, response.view):
                    cases[index] = Case(response.view, given)
        for index, correct in zip(cases, self._judge.correct(list(cases.values())), strict=True):
            parts[index] = float(correct)
        return parts


def rule_parts(responses: Sequence[Response], config: RewardConfig) -> list[dict[str, float]]:
    """``score`` of many responses: their mathematical answers are compared side by side, within a common bound.

    Raises:
        UserError: a record's answer cannot be read as its answer type.
    """
    pairs = []
    for response in responses:
        if response.view.answer_type == "math":
            given = final_answer(response.text, "math")
            if given is not None and len(given) <= MAX_LENGTH:
                pairs.append((response.view.answer, given))
    equal = compare_all(pairs, at_once=min(MAX_AT_ONCE, cores_of_this_process()))

    def maths(expected: str, given: str) -> bool:
        return equal[expected, given] if (expected, given) in equal else math_equal(expected, given)

    return [score(item.text, item.view, item.finish_reason, config, maths=maths) for item in responses]
