"""What a step drew: every question with its decision, and the ledger's rows that say why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.types import Group, Record

Decision = Literal["kept", "dropped", "carried"]

UNUSABLE = "unusable"
"""Drop reason: the question cannot be asked (`DrawnQuestion.problem` says why); others were drawn in its place."""
OVER_LONG = "over_long"
"""Drop reason: a view's prompt exceeds `data.max_prompt_tokens` after its text followed the images; not sampled."""
SURPLUS = "surplus"
"""Reason: the step had enough groups already. Carried to the next step with `filter.carry_surplus`, else dropped."""
EXPIRED = "expired"
"""Drop reason: carried for more than `filter.max_carried_steps` steps."""


@dataclass
class DrawnQuestion:
    """A question that was drawn, and what a step decided about it."""

    record: Record
    draw_index: int
    """How many questions the run had drawn before this one."""
    drawn_step: int
    """The 0-based step that it was drawn and sampled for; of a carried one an earlier step."""
    refill: int
    """0: drawn at the beginning of that step; k: with its k-th refill."""
    group: Group | None
    """None where it was not sampled."""
    problem: str | None = None
    """Why the question cannot be asked: found as it was drawn, with `data.check=draw`."""
    decision: Decision = "dropped"
    reason: str = ""
    """'kept', or why it was not (``algorithm/filter.py``, and the constants of this file)."""

    def decide(self, decision: Decision, reason: str) -> None:
        """What becomes of it in this step."""
        self.decision, self.reason = decision, reason


@dataclass
class Drawn:
    """What one step drew."""

    step: int
    """0-based."""
    questions: list[DrawnQuestion] = field(default_factory=list)
    """All that were decided about, those carried over from earlier steps first."""
    refills: int = 0
    exhausted: bool = False
    """Whether the questions of all `data.epochs` are used up: the step may be smaller than asked for, and only groups
    that wait can come after it."""
    cache_use: CacheUse = field(default_factory=CacheUse)
    """Of the engine, for all groups that were sampled in this step."""
    round_left: int = 0
    """Questions that are still to be drawn before it is looked whether there are enough groups."""
    is_complete: bool = False
    """Whether nothing more is drawn for this step."""
    is_interrupted: bool = False
    """Whether the run has to end before it can train on this; a resumed run goes on with it."""

    @property
    def kept(self) -> list[Group]:
        """The groups to train on."""
        return self._groups("kept")

    @property
    def dropped(self) -> list[Group]:
        """The sampled groups that will never be trained on."""
        return self._groups("dropped")

    @property
    def carried(self) -> list[DrawnQuestion]:
        """What waits for the next step."""
        return [question for question in self.questions if question.decision == "carried"]

    @property
    def ends_run(self) -> bool:
        """Whether there is nothing to train on, now or later."""
        return self.exhausted and not self.kept

    @property
    def groups(self) -> list[Group]:
        """All groups that were sampled in this step, whatever became of them."""
        fresh = (question.group for question in self.questions if question.drawn_step == self.step)
        return [group for group in fresh if group is not None]

    @property
    def reasons(self) -> Counter[str]:
        """Number of dropped questions by reason."""
        return Counter(question.reason for question in self.questions if question.decision == "dropped")

    def facts(self) -> dict[str, Any]:
        """What the ranks have to agree on before they train on it (JSON)."""
        rollouts = [rollout for group in self.kept for rollout in group.rollouts]
        tokens = hashlib.blake2b(digest_size=8)
        for rollout in rollouts:
            tokens.update(rollout.token_ids.tobytes())
        return {
            "step": self.step,
            "groups": len(self.kept),
            "rollouts": len(rollouts),
            "tokens": sum(len(rollout.token_ids) for rollout in rollouts),
            "token_digest": tokens.hexdigest(),
            "reward": sum(rollout.reward for rollout in rollouts),
        }

    def _groups(self, decision: Decision) -> list[Group]:
        chosen = (question.group for question in self.questions if question.decision == decision)
        return [group for group in chosen if group is not None]


def ledger_rows(drawn: Drawn) -> list[dict[str, Any]]:
    """A row of `groups.jsonl` for every question of the step. A carried one has a row in each step that meets it.

    ``step`` counts from 1, as in `metrics.jsonl`: the number of steps done when this one is.
    """
    return [
        {
            "step": drawn.step + 1,
            "record": question.record.id,
            "kind": question.record.kind,
            "draw": question.draw_index,
            "drawn_step": question.drawn_step + 1,
            "refill": question.refill,
            "decision": question.decision,
            "reason": question.reason,
            **({} if question.problem is None else {"problem": question.problem}),
            **({} if question.group is None else _outcome(question.group)),
        }
        for question in drawn.questions
    ]


def _outcome(group: Group) -> dict[str, Any]:
    """What the filter saw."""
    rollouts = group.rollouts
    return {
        "orders": [list(view.order) for view in group.views],
        "accuracy_by_order": [
            _mean([rollout.correctness for rollout in rollouts if rollout.view_index == view.index])
            for view in group.views
        ],
        "accuracy": _mean([rollout.correctness for rollout in rollouts]),
        "reward_mean": _mean(group.rewards()),
        "reward_std": float(np.std(group.rewards())),
        "truncated": _mean([rollout.finish_reason == "length" for rollout in rollouts]),
        "unparsable": _mean([not rollout.readable for rollout in rollouts]),
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))
