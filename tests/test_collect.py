"""Groups from questions, with an engine whose answers the test decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from perl_megatron.collect import OVER_LONG, GroupCollector, assign_advantages
from perl_megatron.config.schema import AlgorithmConfig, Config
from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.errors import UserError
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.rollout.engine import Sampling
from perl_megatron.types import EncodedPrompt, PermutationContract, Record, ReferenceRule, Rollout, View

VERSIONS = np.zeros(2, np.int64)
RIGHT, WRONG = "<think>.</think>\\boxed{7}", "<think>.</think>\\boxed{0}"


class ScriptedEngine:
    """Answers each rollout by ``answer(view, rollout number)``."""

    def __init__(self, answer: Callable[[View, int], str]):
        self.answer, self.seeds = answer, []

    def take_cache_use(self) -> CacheUse:
        return CacheUse(images=len(self.seeds))

    def generate(
        self, views: Sequence[View], prompts: Sequence[EncodedPrompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Rollout]:
        self.seeds += seeds
        return [
            Rollout(view.index, np.array([1, 2]), np.zeros(2, np.float32), "stop", self.answer(view, number), VERSIONS)
            for view in views
            for number in range(sampling.num_rollouts)
        ]


class LengthEncoder:
    """A prompt has as many tokens as its text has characters."""

    def encode(self, view: View) -> EncodedPrompt:
        return EncodedPrompt(np.zeros(len(view.text), np.int64), (), (), np.zeros((0, 3), np.int64), ())


def make_records(count: int) -> list[Record]:
    contract = PermutationContract(movable=(0, 1), references=(ReferenceRule.INDEX,))
    text = "<image><image>Which digit is in image 1?"
    images = (Path("a.png"), Path("b.png"))
    return [Record(f"r{number}", images, text, "7", "number", contract=contract) for number in range(count)]


def collector(answer: Callable[[View, int], str], **sections: dict) -> tuple[GroupCollector, ScriptedEngine]:
    settings = {"model": {"path": Path("unused")}, "rollout": {"questions_per_step": 4, "num_rollouts": 3}} | sections
    config = Config.model_validate(settings)
    records, engine = make_records(10), ScriptedEngine(answer)
    return GroupCollector(config, records, ShuffledSampler(10, 0), LengthEncoder(), engine), engine  # type: ignore[arg-type]


def half_right(view: View, number: int) -> str:
    return RIGHT if number == 0 else WRONG


def test_a_group_joins_all_views_and_each_is_graded_by_its_own_answer() -> None:
    groups, engine = collector(half_right)
    drawn = groups.collect(step=0, alpha=1.0)
    assert [len(group.rollouts) for group in drawn.kept] == [6] * 4
    assert not drawn.reasons
    assert drawn.refills == 0
    group = drawn.kept[0]
    assert [view.permuted for view in group.views] == [False, True]
    assert group.views[1].text.endswith("image 2?")
    assert [rollout.view_index for rollout in group.rollouts] == [0, 0, 0, 1, 1, 1]
    assert [rollout.reward for rollout in group.rollouts] == pytest.approx([1.0, 0.1, 0.1] * 2)
    assert len(set(engine.seeds)) == len(engine.seeds) == 8


def test_dropped_groups_are_replaced_until_enough_are_kept() -> None:
    """Records with an even number give no signal."""
    groups, engine = collector(
        lambda view, number: RIGHT if int(view.record_id[1:]) % 2 == 0 else half_right(view, number)
    )
    drawn = groups.collect(step=0, alpha=1.0)
    assert len(drawn.kept) == 4
    assert all(int(group.record.id[1:]) % 2 == 1 for group in drawn.kept)
    assert drawn.reasons == {"no_signal": len(drawn.dropped)}
    assert drawn.refills >= 1
    assert groups.sampler.num_drawn == len(drawn.kept) + len(drawn.dropped)
    assert len(set(engine.seeds)) == len(engine.seeds)


def test_exhausted_refills_train_on_what_is_left_or_end_with_the_reasons() -> None:
    one_good, _ = collector(
        lambda view, number: half_right(view, number) if view.record_id == "r3" else WRONG, filter={"max_refills": 2}
    )
    drawn = one_good.collect(step=0, alpha=1.0)
    assert drawn.refills == 2
    assert {group.record.id for group in drawn.kept} == {"r3"}
    none_good, _ = collector(lambda view, number: WRONG, filter={"max_refills": 2})
    with pytest.raises(UserError, match=r"all 12 groups were dropped: \{'no_signal': 12\}"):
        none_good.collect(step=0, alpha=1.0)


def test_a_view_that_grew_too_long_drops_the_record_by_name() -> None:
    limit = len(make_records(1)[0].text) - 1
    groups, engine = collector(half_right, data={"max_prompt_tokens": limit}, filter={"max_refills": 0})
    with pytest.raises(UserError, match=OVER_LONG):
        groups.collect(step=0, alpha=1.0)
    assert engine.seeds == []


def test_advantages_share_one_baseline_over_all_views() -> None:
    """The original is always answered right and the copy never: within a view there is no signal, jointly there is."""
    groups, _ = collector(lambda view, number: WRONG if view.permuted else RIGHT)
    kept = groups.collect(step=0, alpha=1.0).kept
    assign_advantages(kept, AlgorithmConfig(standardize=False))
    assert [rollout.advantage for rollout in kept[0].rollouts] == pytest.approx([0.45] * 3 + [-0.45] * 3)


def test_views_by_themselves_have_advantages_of_their_own() -> None:
    """The original is right once, the copy never: only the original's responses have a signal."""
    groups, _ = collector(lambda view, number: RIGHT if number == 0 and not view.permuted else WRONG)
    kept = groups.collect(step=0, alpha=1.0).kept
    assign_advantages(kept, AlgorithmConfig(standardize=False, advantage_level="view"))
    assert [rollout.advantage for rollout in kept[0].rollouts] == pytest.approx([0.6, -0.3, -0.3, 0, 0, 0])


def test_a_kl_penalty_is_taken_off_the_reward_that_stays() -> None:
    groups, _ = collector(half_right)
    kept = groups.collect(step=0, alpha=1.0).kept[:1]
    for number, rollout in enumerate(kept[0].rollouts):
        rollout.kl_penalty = 0.1 * number
    assign_advantages(kept, AlgorithmConfig(standardize=False))
    assert [rollout.reward for rollout in kept[0].rollouts] == pytest.approx([1.0, 0.1, 0.1] * 2)
    less = np.array([1.0, 0.1, 0.1] * 2) - 0.1 * np.arange(6)
    assert [rollout.advantage for rollout in kept[0].rollouts] == pytest.approx(list(less - less.mean()))


def test_shaping_parts_enter_the_reward_by_their_weights() -> None:
    """Response 0 is right in both views, 1 in the original alone; two tokens of three are within the buffer."""
    reward = {"consistency": 0.5, "overlong": 0.25, "overlong_buffer": 2}
    limits = {"questions_per_step": 4, "num_rollouts": 3, "max_response_tokens": 3}
    groups, _ = collector(
        lambda view, number: RIGHT if number == 0 or (number == 1 and not view.permuted) else WRONG,
        reward=reward,
        rollout=limits,
    )
    group = groups.collect(step=0, alpha=1.0).kept[0]
    assert [rollout.reward_parts["consistency"] for rollout in group.rollouts] == [1, 0, 0, 1, 0, 0]
    assert {rollout.reward_parts["overlong"] for rollout in group.rollouts} == {-0.5}
    expected = np.array([1.5, 1.0, 0.1, 1.5, 0.1, 0.1]) - 0.125
    assert [rollout.reward for rollout in group.rollouts] == pytest.approx(list(expected), abs=1e-15)


def test_the_orders_are_planned_as_configured() -> None:
    """Two images, drawn from both orders: some copies of the step are the original, although α is 1."""
    groups, _ = collector(half_right, permutation={"orders": "independent"})
    permuted = {group.views[1].permuted for step in range(4) for group in groups.collect(step=step, alpha=1.0).kept}
    assert permuted == {False, True}


def test_questions_about_the_order_take_the_place_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl_megatron.data.recover_order._content", str)
    groups, _ = collector(
        lambda view, number: f"<think>.</think>\\boxed{{{view.answer if number == 0 else '1, 2'}}}",
        permutation={"recover_order": 1.0},
        data={"max_prompt_tokens": 1000},
    )
    drawn = groups.collect(step=0, alpha=1.0)
    for group in drawn.kept:
        assert group.record.kind == "recover_order"
        assert {view.answer for view in group.views} == {"3, 4", "4, 3"}
        assert [rollout.reward_parts["accuracy"] for rollout in group.rollouts] == [1, 0, 0] * 2
