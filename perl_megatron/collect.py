"""From questions to informative groups: lines 3-9 of PeRL's Algorithm 1, with DAPO's refill.

Every rank runs this on the same questions. Engines share the sampling and give every rank all rollouts, so kept groups
are counted globally and all ranks leave the refill loop together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from perl_megatron.algorithm.advantage import step_advantages
from perl_megatron.algorithm.filter import judge
from perl_megatron.algorithm.shaping import add_shaping_parts
from perl_megatron.config.schema import AlgorithmConfig, Config
from perl_megatron.data.group_state import group_from_json, group_to_json
from perl_megatron.data.permutation import apply_order
from perl_megatron.data.planner import plan_views
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.data.question_stream import QuestionStream
from perl_megatron.data.recover_order import maybe_recover_order
from perl_megatron.data.wait_clock import DataWaits
from perl_megatron.drawn import EXPIRED, OVER_LONG, SURPLUS, UNUSABLE, Drawn, DrawnQuestion
from perl_megatron.errors import UserError
from perl_megatron.reward.score import total
from perl_megatron.reward.scorer import Response, Scorer
from perl_megatron.rollout.engine import RolloutEngine, Sampling
from perl_megatron.runtime.collective import shared_batches, together
from perl_megatron.runtime.rng import derive_seed
from perl_megatron.step_in_progress import StepInProgress
from perl_megatron.types import Group, Record

Phase = Callable[[str], AbstractContextManager[None]]
"""Times and watches a part of a step by its name."""


class NothingKeptError(UserError):
    """A step kept no group."""

    def __init__(self, drawn: Drawn):
        super().__init__(
            f"step {drawn.step}: all {sum(drawn.reasons.values())} groups were dropped: {dict(drawn.reasons)}",
            where="filter.* and filter.max_refills",
            fix="widen the accuracy band, allow more refills, check that the policy ever answers right (groups.jsonl "
            "has every group), or set filter.skip_empty_steps=true to go on without an update",
        )
        self.drawn = drawn


class GroupCollector:
    """Draws questions until a step has enough groups with a learning signal."""

    def __init__(
        self,
        config: Config,
        questions: QuestionStream,
        encoder: PromptEncoder,
        engine: RolloutEngine,
    ):
        self.config, self.questions = config, questions
        self.encoder, self.engine, self.scorer = encoder, engine, Scorer(config)
        self._waiting: tuple[DrawnQuestion, ...] = ()
        self._in_progress: StepInProgress | None = None
        self._must_stop: Callable[[], bool] = lambda: False
        self._phases: Phase = lambda name: nullcontext()

    def collect(self, step: int, alpha: float) -> Drawn:
        """The groups of ``step``; ``alpha`` is the probability that a question gets permuted copies.

        Groups carried over from earlier steps come first. Where all `data.epochs` are used up, fewer groups than
        asked for may be kept, or none; and with `filter.skip_empty_steps` a step may keep none at any time. A step that
        ends the run, or fails, leaves the position where it was: a resumed run draws its questions again. So does one
        that is interrupted (``stop_by``); it is kept as ``in_progress``, and a resumed run goes on with it.

        Raises:
            NothingKeptError: no group was kept after `filter.max_refills` refills, though there are more questions.
        """
        position = self.questions.state_dict()
        try:
            drawn = self._take_up(step)
            drawn.is_interrupted = not self._collect(drawn, alpha)
            if drawn.is_complete and not drawn.kept and not drawn.exhausted and not self.config.filter.skip_empty_steps:
                raise NothingKeptError(drawn)
        except UserError:
            self.questions.load_state_dict(position)
            raise
        if drawn.is_interrupted:
            self._in_progress = StepInProgress(drawn, begins=position, ends=self.questions.state_dict())
        if drawn.is_interrupted or drawn.ends_run:
            self.questions.load_state_dict(position)
        else:
            self._waiting = tuple(drawn.carried)
        return drawn

    def _collect(self, drawn: Drawn, alpha: float) -> bool:
        """Draw until there are enough; False where the run has to end before it could train on them."""
        config, wanted = self.config, self.config.rollout.questions_per_step
        while drawn.round_left or not (drawn.is_complete or drawn.exhausted or len(drawn.kept) >= wanted):
            missing = math.ceil((wanted - len(drawn.kept)) * config.filter.oversample)
            drawn.round_left = drawn.round_left or self._bounded(missing)
            while drawn.round_left:
                if self._must_stop():
                    return False
                self._draw_some(drawn, alpha)
            if len(drawn.kept) >= wanted or drawn.refills == config.filter.max_refills:
                break
            drawn.refills += 1
        drawn.is_complete = True
        return drawn.ends_run or not self._must_stop()

    def _draw_some(self, drawn: Drawn, alpha: float) -> None:
        """Draw, sample and judge what one call of the engine is for."""
        wanted, count = self.config.rollout.questions_per_step, drawn.round_left
        count = min(count, self.config.rollout.questions_per_call or count)
        fresh = self._draw(count, drawn.step, drawn.refills)
        self._sample(fresh, drawn.step, alpha)
        for question in fresh:
            self._decide(question, has_room=len(drawn.kept) < wanted)
            drawn.questions.append(question)
        drawn.exhausted = self._left() == 0
        drawn.round_left = 0 if drawn.exhausted else drawn.round_left - count
        drawn.cache_use = drawn.cache_use + self.engine.take_cache_use()

    def _take_up(self, step: int) -> Drawn:
        """What an interrupted start of this step has left, or a beginning."""
        left, self._in_progress = self._in_progress, None
        if left is None or left.drawn.step != step:
            return Drawn(step, self._take_waiting(step), exhausted=self._left() == 0)
        self.questions.load_state_dict(left.ends)
        return left.drawn

    def stop_by(self, must_stop: Callable[[], bool]) -> None:
        """Ask between two calls of the engine, on all ranks, whether the run has to end before a step could."""
        self._must_stop = must_stop

    @property
    def in_progress(self) -> StepInProgress | None:
        """The step that was interrupted, or that a resumed run is to go on with."""
        return self._in_progress

    def go_on_with(self, left: StepInProgress) -> None:
        """Let the step that was interrupted be taken up where it was left."""
        self._in_progress = left

    def await_rollouts(self, bring_weights: Callable[[], None]) -> None:
        """Nothing is ever under way between two calls of ``collect``."""

    def watch(self, phases: Phase) -> None:
        """Let reading of data and scoring be phases of their own."""
        self._phases = phases

    def take_waits(self) -> DataWaits:
        """What this thread has waited for data since the last call."""
        return self.encoder.take_waits()

    def close(self) -> None:
        """Nothing is under way; let go of what scores."""
        self.scorer.close()

    def state(self) -> Callable[[], dict[str, Any]]:
        """Where a resumed run has to go on, as it is now; the call that writes it out (as JSON) may come later."""
        sampler, waiting = self.questions.state_dict(), self._waiting
        return lambda: {"sampler": sampler, "waiting": [_question_to_json(question) for question in waiting]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` wrote (before groups could wait, it was the sampler's alone)."""
        self.questions.load_state_dict(state["sampler"])
        waiting = state.get("waiting", ())
        self._waiting = together(lambda: tuple(self._question_from_json(saved) for saved in waiting))

    def _take_waiting(self, step: int) -> list[DrawnQuestion]:
        """The groups of earlier steps, those that have waited too long dropped, the others kept while there is room."""
        wanted, oldest = self.config.rollout.questions_per_step, step - self.config.filter.max_carried_steps
        # Copies: the step that carried them may not have been logged yet.
        questions = [replace(question) for question in self._waiting]
        num_kept = 0
        for question in questions:
            if question.drawn_step < oldest:
                question.decide("dropped", EXPIRED)
            elif num_kept < wanted:
                question.decide("kept", "kept")
                num_kept += 1
        return questions

    def _left(self) -> int | None:
        """The number of questions that are left of all `data.epochs`; None without a limit."""
        epochs = self.config.data.epochs
        return None if epochs is None else epochs * self.questions.num_records - self.questions.num_drawn

    def _bounded(self, count: int) -> int:
        """``count``, or the number of questions that are left, if these are fewer."""
        left = self._left()
        return count if left is None else min(count, left)

    def _draw(self, count: int, step: int, refill: int) -> list[DrawnQuestion]:
        with self._phases("data"), self.encoder.waits("questions"):
            questions = self.questions.next(count, limit=self._left())
        return [
            DrawnQuestion(question.record, question.draw_index, step, refill, None, question.problem)
            for question in questions
        ]

    def _decide(self, question: DrawnQuestion, *, has_room: bool) -> None:
        if question.group is None:
            question.decide("dropped", OVER_LONG if question.problem is None else UNUSABLE)
            return
        algorithm = self.config.algorithm
        within_views = algorithm.advantage_level == "view" or (
            algorithm.advantage_level == "two_level" and algorithm.within_weight == 1
        )
        verdict = judge(question.group, self.config.filter, within_views=within_views)
        if not verdict.keep:
            question.decide("dropped", verdict.reason)
        elif has_room:
            question.decide("kept", verdict.reason)
        else:
            question.decide("carried" if self.config.filter.carry_surplus else "dropped", SURPLUS)

    def _sample(self, questions: Sequence[DrawnQuestion], step: int, alpha: float) -> None:
        """A scored group for each question whose prompts fit the limit."""
        config = self.config
        # Images are read here, which can fail on one rank alone.
        with self._phases("data"), self.encoder.waits("questions"):
            seeds = together(lambda: self._ask(questions, step, alpha))
        groups = [question.group for question in questions if question.group is not None]
        if not groups:
            return
        sampling = Sampling(
            num_rollouts=config.rollout.num_rollouts,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_tokens=config.rollout.max_response_tokens,
        )
        views_of_all = [view for group in groups for view in group.views]
        prompts_of_all = [prompt for group in groups for prompt in group.prompts]
        rollouts = self.engine.generate(views_of_all, prompts_of_all, sampling, seeds=seeds)
        group_size = (config.permutation.num_permuted + 1) * config.rollout.num_rollouts
        for index, group in enumerate(groups):
            group.rollouts = rollouts[index * group_size : (index + 1) * group_size]
        with self._phases("reward"):
            self._score(groups)

    def _ask(self, questions: Sequence[DrawnQuestion], step: int, alpha: float) -> list[int]:
        """Give each question whose prompts fit the limit a group without rollouts; the seeds of all groups' views."""
        config = self.config
        permutation, keys = config.permutation, {"seed": config.run.seed, "step": step}
        seeds: list[int] = []
        for question in questions:
            if question.problem is not None:
                continue
            question.record = maybe_recover_order(
                question.record, self._image_keys, probability=permutation.recover_order, **keys
            )
            views = plan_views(
                question.record, num_permuted=permutation.num_permuted, orders=permutation.orders, alpha=alpha, **keys
            )
            prompts = tuple(self.encoder.encode(view) for view in views)
            if max(len(prompt.token_ids) for prompt in prompts) > config.data.max_prompt_tokens:
                continue
            question.group = Group(question.record, views, prompts, [])
            seeds += [derive_seed(config.run.seed, "rollout", step, question.draw_index, view.index) for view in views]
        return seeds

    def _image_keys(self, record: Record) -> tuple[str, ...]:
        return self.encoder.encode(apply_order(record, range(len(record.images)), 0)).image_keys

    def _score(self, groups: Sequence[Group]) -> None:
        """Reward every rollout against its own view's answer (PeRL Eq. 4), and for what the other views' got right."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        responses = [
            Response(rollout.text, group.views[rollout.view_index], rollout.finish_reason)
            for group in groups
            for rollout in group.rollouts
        ]
        for rollout, scored in zip(rollouts, shared_batches(self.scorer.score_all, responses), strict=True):
            rollout.reward_parts, rollout.readable = scored.parts, scored.readable
        for group in groups:
            add_shaping_parts(group, self.config.reward, max_response_tokens=self.config.rollout.max_response_tokens)
        for rollout in rollouts:
            rollout.reward = total(rollout.reward_parts, self.config.reward)

    def _question_from_json(self, saved: dict[str, Any]) -> DrawnQuestion:
        group = group_from_json(saved["group"], self.encoder.encode)
        question = DrawnQuestion(group.record, saved["draw_index"], saved["drawn_step"], saved["refill"], group)
        question.decide("carried", SURPLUS)
        return question


def _question_to_json(question: DrawnQuestion) -> dict[str, Any]:
    assert question.group is not None, "only sampled groups wait"
    position = {name: getattr(question, name) for name in ("draw_index", "drawn_step", "refill")}
    return {**position, "group": group_to_json(question.group)}


def assign_advantages(groups: Sequence[Group], algorithm: AlgorithmConfig) -> None:
    """Advantages of all groups of a step (PeRL Eq. 5 or its relatives), one for each rollout."""
    rewards = [group.penalized_rewards() for group in groups]
    views = [np.array([rollout.view_index for rollout in group.rollouts]) for group in groups]
    for group, advantages in zip(groups, step_advantages(rewards, views, algorithm), strict=True):
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            rollout.advantage = float(advantage)
