"""Groups that wait for the next step, the end of the questions, and steps that fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
from collect_case import CARRY, WRONG, collector, decisions, half_right

from perl_megatron.drawn import EXPIRED, SURPLUS, ledger_rows
from perl_megatron.errors import UserError
from perl_megatron.types import View


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
    assert sizes == [(4, False)] * 4 + [(4, True), (0, True)]
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
    assert groups.questions.num_drawn == 0  # a resumed run with more epochs meets them again, and so does its ledger


def test_the_last_questions_of_all_may_be_dropped_without_a_refill() -> None:
    """Eight are used, the last two dropped; there is nothing to draw in their place."""
    groups, _ = collector(half_right, data={"epochs": 1}, filter={"max_refills": 0}, rollout={"questions_per_step": 8})
    assert len(groups.collect(0, 1.0).kept) == 8
    groups.engine.answer = lambda view, number: WRONG  # type: ignore[attr-defined]
    drawn = groups.collect(1, 1.0)
    assert (drawn.exhausted, drawn.reasons) == (True, {"no_signal": 2})


def test_a_step_that_fails_leaves_its_questions_to_a_resumed_run() -> None:
    groups, engine = collector(half_right, **CARRY)
    groups.collect(0, 1.0)

    def fail(view: View, number: int) -> str:
        raise UserError("the engine is gone")

    engine.answer, engine.seeds = fail, []
    groups.collect(1, 1.0)  # by what was carried
    before = groups.state()()
    with pytest.raises(UserError, match="is gone"):
        groups.collect(2, 1.0)
    assert groups.state()() == before
    engine.answer = half_right
    assert [question.draw_index for question in groups.collect(2, 1.0).questions] == list(range(8, 16))


def test_carried_groups_are_used_after_the_last_question_was_drawn() -> None:
    groups, _ = collector(half_right, data={"epochs": 1}, **CARRY)
    sizes = [len(groups.collect(step, 1.0).kept) for step in range(4)]
    assert sizes == [4, 4, 2, 0]
