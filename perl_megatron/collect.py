"""From questions to informative groups: lines 3-9 of PeRL's Algorithm 1, with DAPO's refill.

Every rank runs this on the same questions. Engines share the sampling and give every rank all rollouts, so kept groups
are counted globally and all ranks leave the refill loop together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from perl_megatron.algorithm.advantage import step_advantages
from perl_megatron.algorithm.filter import judge
from perl_megatron.algorithm.shaping import add_shaping_parts
from perl_megatron.config.schema import AlgorithmConfig, Config
from perl_megatron.data.planner import plan_views
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.data.recover_order import maybe_recover_order
from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.errors import UserError
from perl_megatron.reward.score import score, total
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.rollout.engine import RolloutEngine, Sampling
from perl_megatron.runtime.collective import shared_map
from perl_megatron.runtime.rng import derive_seed
from perl_megatron.types import Group, Record, Rollout, View

OVER_LONG = "over_long"
"""Drop reason: a view's prompt exceeds `data.max_prompt_tokens` after its text followed the images."""


@dataclass
class Drawn:
    """What one step drew."""

    kept: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    """Number of dropped groups by reason."""
    refills: int = 0
    cache_use: CacheUse = field(default_factory=CacheUse)
    """Of the engine, for all groups that were sampled."""

    @property
    def groups(self) -> list[Group]:
        """All groups that were sampled, kept or not."""
        return self.kept + self.dropped


class GroupCollector:
    """Draws questions until a step has enough groups with a learning signal."""

    def __init__(
        self,
        config: Config,
        records: Sequence[Record],
        sampler: ShuffledSampler,
        encoder: PromptEncoder,
        engine: RolloutEngine,
    ):
        self.config, self.records, self.sampler = config, records, sampler
        self.encoder, self.engine = encoder, engine

    def collect(self, step: int, alpha: float) -> Drawn:
        """The groups of ``step``; ``alpha`` is the probability that a question gets permuted copies.

        Raises:
            UserError: no group was kept after `filter.max_refills` refills; the message holds the drop reasons.
        """
        wanted = self.config.rollout.questions_per_step
        drawn = Drawn()
        while True:
            draw_indices = range(self.sampler.num_drawn, self.sampler.num_drawn + wanted - len(drawn.kept))
            records = [self.records[index] for index in self.sampler.next(len(draw_indices))]
            for group in self._sample_groups(records, step, alpha, draw_indices, drawn.reasons):
                verdict = judge(group, self.config.filter)
                if verdict.keep:
                    drawn.kept.append(group)
                else:
                    drawn.dropped.append(group)
                    drawn.reasons[verdict.reason] += 1
            if len(drawn.kept) >= wanted or drawn.refills == self.config.filter.max_refills:
                break
            drawn.refills += 1
        drawn.cache_use = self.engine.take_cache_use()
        if not drawn.kept:
            raise UserError(
                f"step {step}: all {sum(drawn.reasons.values())} groups were dropped: {dict(drawn.reasons)}",
                where="filter.* and filter.max_refills",
                fix="widen the accuracy band, allow more refills, or check that the policy ever answers right",
            )
        return drawn

    def await_rollouts(self, bring_weights: Callable[[], None]) -> None:
        """Nothing is ever under way between two calls of ``collect``."""

    def close(self) -> None:
        """Nothing is under way."""

    def sampler_state(self) -> dict[str, int]:
        """Where a resumed run has to go on with the records."""
        return self.sampler.state_dict()

    def _sample_groups(
        self, records: Sequence[Record], step: int, alpha: float, draw_indices: range, reasons: Counter[str]
    ) -> list[Group]:
        """One scored group for each record that fits the prompt limit."""
        config = self.config
        permutation, keys = config.permutation, {"seed": config.run.seed, "step": step}
        groups, seeds = [], []
        for drawn, draw_index in zip(records, draw_indices, strict=True):
            record = maybe_recover_order(drawn, probability=permutation.recover_order, **keys)
            views = plan_views(
                record, num_permuted=permutation.num_permuted, orders=permutation.orders, alpha=alpha, **keys
            )
            prompts = tuple(self.encoder.encode(view) for view in views)
            if max(len(prompt.token_ids) for prompt in prompts) > config.data.max_prompt_tokens:
                reasons[OVER_LONG] += 1
                continue
            groups.append(Group(record, views, prompts, []))
            seeds += [derive_seed(config.run.seed, "rollout", step, draw_index, view.index) for view in views]
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
        self._score(groups)
        return groups

    def _score(self, groups: Sequence[Group]) -> None:
        """Reward every rollout against its own view's answer (PeRL Eq. 4), and for what the other views' got right."""
        pairs = [(rollout, group.views[rollout.view_index]) for group in groups for rollout in group.rollouts]

        def parts(pair: tuple[Rollout, View]) -> dict[str, float]:
            rollout, view = pair
            return score(rollout.text, view, rollout.finish_reason, self.config.reward)

        for (rollout, _), reward_parts in zip(pairs, shared_map(parts, pairs), strict=True):
            rollout.reward_parts = reward_parts
        for group in groups:
            add_shaping_parts(group, self.config.reward, max_response_tokens=self.config.rollout.max_response_tokens)
        for rollout, _ in pairs:
            rollout.reward = total(rollout.reward_parts, self.config.reward)


def assign_advantages(groups: Sequence[Group], algorithm: AlgorithmConfig) -> None:
    """Advantages of all groups of a step (PeRL Eq. 5 or its relatives), one for each rollout."""
    rewards = [group.penalized_rewards() for group in groups]
    views = [np.array([rollout.view_index for rollout in group.rollouts]) for group in groups]
    for group, advantages in zip(groups, step_advantages(rewards, views, algorithm), strict=True):
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            rollout.advantage = float(advantage)
