"""Groups from questions, with an engine whose answers the test decides."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from perl_megatron.collect import GroupCollector, NothingKeptError, assign_advantages
from perl_megatron.config.schema import AlgorithmConfig, Config
from perl_megatron.data.question_stream import DrawChecks, QuestionStream
from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.drawn import EXPIRED, OVER_LONG, SURPLUS, UNUSABLE, Drawn, ledger_rows
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
    """A prompt has as many tokens as its text has characters; files of the same first letter hold the same image."""

    def encode(self, view: View) -> EncodedPrompt:
        keys = tuple(path.name[0] for path in view.images)
        return EncodedPrompt(np.zeros(len(view.text), np.int64), (), (), np.zeros((0, 3), np.int64), keys)


def make_records(count: int) -> list[Record]:
    contract = PermutationContract(movable=(0, 1), references=(ReferenceRule.INDEX,))
    text = "<image><image>Which digit is in image 1?"
    images = (Path("a.png"), Path("b.png"))
    return [Record(f"r{number}", images, text, "7", "number", contract=contract) for number in range(count)]


def collector(answer: Callable[[View, int], str], **sections: dict) -> tuple[GroupCollector, ScriptedEngine]:
    settings = {"model": {"path": Path("unused")}, "rollout": {"questions_per_step": 4, "num_rollouts": 3}} | sections
    config = Config.model_validate(settings)
    records, engine = make_records(10), ScriptedEngine(answer)
    questions = QuestionStream(records, ShuffledSampler(10, 0))
    return GroupCollector(config, questions, LengthEncoder(), engine), engine  # type: ignore[arg-type]


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
    assert groups.questions.num_drawn == len(drawn.kept) + len(drawn.dropped)
    assert len(set(engine.seeds)) == len(engine.seeds)


def test_exhausted_refills_train_on_what_is_left_or_end_with_the_reasons() -> None:
    one_good, _ = collector(
        lambda view, number: half_right(view, number) if view.record_id == "r3" else WRONG, filter={"max_refills": 2}
    )
    drawn = one_good.collect(step=0, alpha=1.0)
    assert drawn.refills == 2
    assert {group.record.id for group in drawn.kept} == {"r3"}
    none_good, _ = collector(lambda view, number: WRONG, filter={"max_refills": 2})
    with pytest.raises(UserError, match=r"all 12 groups were dropped: \{'no_signal': 12\}") as caught:
        none_good.collect(step=0, alpha=1.0)
    assert isinstance(caught.value, NothingKeptError)
    assert [row["reason"] for row in ledger_rows(caught.value.drawn)] == ["no_signal"] * 12


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


CARRY = {
    "filter": {"oversample": 2.0, "carry_surplus": True},
    "algorithm": {"importance_correction": "truncated"},
}


def decisions(drawn: Drawn) -> list[tuple[int, str, str]]:
    return [(row["draw"], row["decision"], row["reason"]) for row in ledger_rows(drawn)]


def test_surplus_is_dropped_by_name_unless_it_is_carried() -> None:
    groups, _ = collector(half_right, filter={"oversample": 1.5})
    drawn = groups.collect(step=0, alpha=1.0)
    kept = [(draw, "kept", "kept") for draw in range(4)]
    assert decisions(drawn) == [*kept, (4, "dropped", SURPLUS), (5, "dropped", SURPLUS)]
    assert groups.questions.num_drawn == 6


def test_carried_groups_come_first_in_the_next_step_and_are_not_sampled_again() -> None:
    groups, engine = collector(half_right, **CARRY)
    first = groups.collect(step=0, alpha=1.0)
    assert decisions(first)[4:] == [(draw, "carried", SURPLUS) for draw in range(4, 8)]
    assert len(first.groups) == 8
    num_seeds = len(engine.seeds)
    second = groups.collect(step=1, alpha=1.0)
    assert decisions(second) == [(draw, "kept", "kept") for draw in range(4, 8)]
    assert [row["drawn_step"] for row in ledger_rows(second)] == [1] * 4
    assert [row["step"] for row in ledger_rows(second)] == [2] * 4
    assert second.groups == []
    assert len(engine.seeds) == num_seeds
    assert [group.record.id for group in second.kept] == [item.record.id for item in first.carried]


def test_what_was_carried_too_long_is_dropped() -> None:
    """Ten times as many as needed are drawn: step 1 uses four of them, the others are two steps old in step 2."""
    settings = CARRY | {"filter": {"oversample": 10.0, "carry_surplus": True}}
    groups, _ = collector(half_right, **settings)
    groups.collect(step=0, alpha=1.0)
    second = groups.collect(step=1, alpha=1.0)
    assert [decision for _, decision, _ in decisions(second)] == ["kept"] * 4 + ["carried"] * 32
    third = groups.collect(step=2, alpha=1.0)
    assert third.reasons == {EXPIRED: 32}
    assert len(third.kept) == 4
    assert {row["drawn_step"] for row in ledger_rows(third) if row["decision"] == "kept"} == {3}


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_collector_goes_on_as_if_it_had_not_stopped(stop_after: int) -> None:
    """Through JSON, as in a checkpoint; groups of uneven steps wait."""

    def informative(view: View, number: int) -> str:
        return half_right(view, number) if int(view.record_id[1:]) % 3 else WRONG

    whole, _ = collector(informative, **CARRY)
    expected = [whole.collect(step, alpha=1.0) for step in range(6)]
    before, _ = collector(informative, **CARRY)
    for step in range(stop_after):
        before.collect(step, alpha=1.0)
    write = before.state()
    before.collect(stop_after, alpha=1.0)  # what is under way when a checkpoint is written does not belong to it
    after, _ = collector(informative, **CARRY)
    after.load_state(json.loads(json.dumps(write())))
    resumed = [after.collect(step, alpha=1.0) for step in range(stop_after, 6)]
    assert any(drawn.carried for drawn in expected)
    for mine, theirs in zip(resumed, expected[stop_after:], strict=True):
        assert ledger_rows(mine) == ledger_rows(theirs)
        for group, other in zip(mine.kept, theirs.kept, strict=True):
            assert (group.record, group.views) == (other.record, other.views)
            for rollout, twin in zip(group.rollouts, other.rollouts, strict=True):
                np.testing.assert_equal(vars(rollout), vars(twin))


def test_a_checkpoint_from_before_groups_could_wait_is_taken_up() -> None:
    groups, _ = collector(half_right)
    groups.load_state({"sampler": {"num_records": 10, "seed": 0, "num_drawn": 7}})
    assert groups.questions.num_drawn == 7
    assert len(groups.collect(0, 1.0).kept) == 4


def test_epochs_end_with_a_smaller_step_and_then_with_none() -> None:
    """Ten records, twice, by four: the fifth step has the last four; of nine, it has one."""
    groups, _ = collector(half_right, data={"epochs": 2})
    sizes = [(len(drawn.kept), drawn.exhausted) for drawn in (groups.collect(step, 1.0) for step in range(6))]
    assert sizes == [(4, False)] * 5 + [(0, True)]
    odd, engine = collector(half_right, data={"epochs": 1})
    assert [len(odd.collect(step, 1.0).kept) for step in range(3)] == [4, 4, 2]
    num_seeds = len(engine.seeds)
    assert odd.collect(3, 1.0).kept == []
    assert len(engine.seeds) == num_seeds
    assert odd.questions.num_drawn == 10


def test_at_the_end_of_the_last_epoch_dropped_groups_are_no_error() -> None:
    groups, _ = collector(lambda view, number: WRONG, data={"epochs": 1}, filter={"max_refills": 10})
    drawn = groups.collect(0, 1.0)
    assert drawn.exhausted
    assert drawn.reasons == {"no_signal": 10}


def test_carried_groups_are_used_after_the_last_question_was_drawn() -> None:
    groups, _ = collector(half_right, data={"epochs": 1}, **CARRY)
    sizes = [len(groups.collect(step, 1.0).kept) for step in range(4)]
    assert sizes == [4, 4, 2, 0]


def test_the_ledger_says_what_the_filter_saw() -> None:
    groups, _ = collector(lambda view, number: WRONG if view.permuted else RIGHT if number else "no box")
    row = ledger_rows(groups.collect(step=0, alpha=1.0))[0]
    assert row["orders"] == [[0, 1], [1, 0]]
    assert row["accuracy_by_order"] == [pytest.approx(2 / 3), 0]
    assert row["accuracy"] == pytest.approx(1 / 3)
    assert row["unparsable"] == pytest.approx(1 / 6)
    assert (row["step"], row["drawn_step"], row["refill"], row["truncated"]) == (1, 1, 0, 0)
    assert (row["decision"], row["reason"]) == ("kept", "kept")


def test_questions_that_cannot_be_asked_are_in_the_ledger_and_others_come_in_their_place() -> None:
    groups, engine = collector(half_right)
    bad = {record.id for record in groups.questions.records[:3]}
    checks = DrawChecks(lambda record: "no image" if record.id in bad else None, lambda images: None, 1.0, "x.jsonl")
    groups.questions = QuestionStream(groups.questions.records, ShuffledSampler(10, 0), checks)
    drawn = [question for step in range(2) for question in groups.collect(step=step, alpha=1.0).questions]
    unusable = [question for question in drawn if question.problem is not None]
    assert {(question.decision, question.reason, question.problem) for question in unusable} == {
        ("dropped", UNUSABLE, "no image")
    }
    assert {question.record.id for question in unusable} <= bad
    assert unusable
    assert sum(question.decision == "kept" for question in drawn) == 8
    assert all(question.refill == 0 for question in drawn)
    assert len(engine.seeds) == 2 * 8


def test_rewards_beside_the_rules_count_and_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def of_order(text, view, finish_reason): return float(view.permuted)"
    (tmp_path / "collect_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = "<think>.</think>\\boxed{seven}"  # has the format, and is no number
    groups, _ = collector(lambda view, number: answer, reward={"functions": ("collect_rewards:of_order=0.5",)})
    group = groups.collect(0, 1.0).kept[0]
    assert [rollout.reward for rollout in group.rollouts] == [0.1] * 3 + [0.6] * 3
    assert group.rollouts[3].reward_parts == {"accuracy": 0.0, "format": 1.0, "of_order": 1.0}
    assert not any(rollout.readable for rollout in group.rollouts)
    groups.close()
