"""Groups from questions: sampled, scored, kept or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from collect_case import RIGHT, WRONG, collector, half_right, make_records

from perl_megatron.collect import NothingKeptError, assign_advantages
from perl_megatron.config.schema import AlgorithmConfig, RewardConfig
from perl_megatron.data.question_stream import DrawChecks, QuestionStream
from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.drawn import OVER_LONG, UNUSABLE, ledger_rows
from perl_megatron.errors import UserError
from perl_megatron.reward.scorer import Response, Scored


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


def test_an_empty_step_may_pass_and_the_next_one_goes_on_behind_its_questions() -> None:
    groups, _ = collector(lambda view, number: WRONG, filter={"max_refills": 0, "skip_empty_steps": True})
    empty = groups.collect(step=0, alpha=1.0)
    assert (empty.kept, empty.ends_run, empty.reasons) == ([], False, {"no_signal": 4})
    assert groups.questions.num_drawn == 4
    later = groups.collect(step=1, alpha=1.0)
    assert len({question.record.id for drawn in (empty, later) for question in drawn.questions}) == 8


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


def test_where_a_judge_is_asked_it_says_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules all are wrong; the judge holds the originals right."""
    groups, _ = collector(lambda view, number: WRONG, filter={"min_accuracy": 0.4, "min_right_per_order": 0})

    def judged(responses: Sequence[Response]) -> list[Scored]:
        return [
            Scored({"accuracy": 0.0, "format": 1.0, "judge": float(not response.view.permuted)}, True)
            for response in responses
        ]

    monkeypatch.setattr(groups.scorer, "score_all", judged)
    groups.config = groups.config.model_copy(update={"reward": RewardConfig(accuracy=0, judge=0.9)})
    drawn = groups.collect(0, 1.0)
    assert len(drawn.kept) == 4
    assert ledger_rows(drawn)[0]["accuracy_by_order"] == [1, 0]


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
    checks = DrawChecks(lambda record: "no image" if record.id in bad else None, 1.0, "x.jsonl")
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
