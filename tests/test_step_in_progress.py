"""A step that is interrupted between two calls of the engine, and goes on in another process as if it had not been."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from collect_case import CARRY, WRONG, LengthEncoder, ScriptedEngine, collector, half_right

from perl_megatron.ahead import AheadCollector
from perl_megatron.collect import GroupCollector
from perl_megatron.drawn import Drawn, ledger_rows
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.step_in_progress import read_step, write_step
from perl_megatron.types import EncodedPrompt, View


def uneven(view: View, number: int) -> str:
    """Of every third record nothing is learnt: steps are refilled."""
    return half_right(view, number) if int(view.record_id[1:]) % 3 else WRONG


class CountingEngine(ScriptedEngine):
    """Counts what it was asked for since the last look, as engines do."""

    def take_cache_use(self) -> CacheUse:
        use, self.seen = CacheUse(images=len(self.seeds) - getattr(self, "seen", 0)), len(self.seeds)
        return use


class SometimesLong(LengthEncoder):
    """Two of ten prompts are too long to be asked."""

    def encode(self, view: View) -> EncodedPrompt:
        prompt = super().encode(view)
        return replace(prompt, token_ids=np.zeros(99_999, np.int64)) if view.record_id in ("r4", "r5") else prompt


def make(**sections: dict) -> GroupCollector:
    """Two questions in a call of the engine."""
    rollout = {"questions_per_step": 4, "num_rollouts": 3, "questions_per_call": 2}
    groups, _ = collector(uneven, **{"rollout": rollout, **CARRY, **sections})
    groups.engine, groups.encoder = CountingEngine(uneven), SometimesLong()  # type: ignore[assignment]
    return groups


def interrupt(groups: GroupCollector, *, after: int) -> None:
    """Let the run end at the ``after``-th time that it is asked, counted from 0."""
    answers = iter([*[False] * after, True])
    groups.stop_by(lambda: next(answers))


def go_on(before: GroupCollector, after: GroupCollector, step: int, file: Path) -> None:
    """What a run's end and its resumption do with the collectors."""
    state = json.loads(json.dumps(before.state()()))
    assert before.in_progress is not None
    write_step(file, before.in_progress)
    after.load_state(state)
    left = read_step(file, step=step, begins=state["sampler"], encode=after.encoder.encode)
    assert left is not None
    after.go_on_with(left)


def assert_same(mine: Drawn, theirs: Drawn) -> None:
    assert ledger_rows(mine) == ledger_rows(theirs)
    assert (mine.refills, mine.exhausted, mine.cache_use) == (theirs.refills, theirs.exhausted, theirs.cache_use)
    assert not mine.is_interrupted
    for question, twin in zip(mine.questions, theirs.questions, strict=True):
        assert question.record == twin.record
        for rollout, other in zip(
            question.group.rollouts if question.group else [], twin.group.rollouts if twin.group else [], strict=True
        ):
            np.testing.assert_equal(vars(rollout), vars(other))


@pytest.mark.parametrize("sections", [{}, {"data": {"epochs": 2}}, {"filter": {"carry_surplus": False}}])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_wherever_it_is_interrupted_nothing_is_sampled_twice_and_all_is_the_same(
    tmp_path: Path, step: int, sections: dict
) -> None:
    whole = make(**sections)
    expected = [whole.collect(number, 1.0) for number in range(4)]
    num_seeds = len(whole.engine.seeds)  # type: ignore[attr-defined]
    for after in range(30):
        before = make(**sections)
        for number in range(step):
            before.collect(number, 1.0)
        begins = before.state()()
        interrupt(before, after=after)
        if not before.collect(step, 1.0).is_interrupted:  # it is not asked so often
            break
        assert before.state()() == begins  # the checkpoint is that of the step's beginning
        resumed = make(**sections)
        go_on(before, resumed, step, tmp_path / "step.json")
        for number in range(step, 4):
            assert_same(resumed.collect(number, 1.0), expected[number])
        sampled = len(before.engine.seeds) + len(resumed.engine.seeds)  # type: ignore[attr-defined]
        assert sampled == num_seeds
    assert after >= (3 if step == 0 else 1), "before, between and after the calls; a later step may have groups enough"


def test_an_interrupted_step_can_be_interrupted_again(tmp_path: Path) -> None:
    expected, groups = make().collect(0, 1.0), make()
    for _ in range(3):
        interrupt(groups, after=1)  # one call each
        assert groups.collect(0, 1.0).is_interrupted
        resumed = make()
        go_on(groups, resumed, 0, tmp_path / "step.json")
        groups = resumed
    assert_same(groups.collect(0, 1.0), expected)


def test_what_does_not_belong_to_the_checkpoint_or_is_damaged_is_drawn_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups, file = make(), tmp_path / "step.json"
    encode, begins = groups.encoder.encode, groups.questions.state_dict()
    assert read_step(file, step=0, begins=begins, encode=encode) is None
    interrupt(groups, after=1)
    groups.collect(0, 1.0)
    write_step(file, groups.in_progress)  # type: ignore[arg-type]
    assert read_step(file, step=0, begins=begins, encode=encode) is not None
    assert read_step(file, step=1, begins=begins, encode=encode) is None
    assert read_step(file, step=0, begins={**begins, "num_drawn": 4}, encode=encode) is None
    assert caplog.records == []
    whole = file.read_text()
    for damaged in (whole[:-20], whole.replace("boxed{7}", "boxed{8}", 1), "", "[]", '{"format": 2}', "{}"):
        assert damaged != whole
        file.write_text(damaged)
        assert read_step(file, step=0, begins=begins, encode=encode) is None
        assert "are drawn again" in caplog.records[-1].message
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


def test_a_step_that_was_sampled_ahead_is_kept_and_nothing_is_begun_after_it() -> None:
    """The thread is interrupted; the loop takes what it has, and a checkpoint then holds the step's beginning."""
    groups = make()
    groups.engine.bring_again = lambda: None  # type: ignore[attr-defined]
    ahead = AheadCollector(groups, groups.engine, lambda step: 1.0, num_steps=4, timeout_seconds=20)  # type: ignore[arg-type]
    asked = 0

    def must_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    ahead.stop_by(must_stop)
    assert not ahead.collect(0, 1.0).is_interrupted
    begins = ahead.state()()
    ahead.await_rollouts(lambda: None)
    assert ahead.in_progress is None  # until the loop takes it, a resumed run draws it again
    drawn = ahead.collect(1, 1.0)
    assert drawn.is_interrupted
    assert ahead.in_progress is not None
    assert ahead.state()() == begins
    assert ahead.in_progress.drawn is drawn
