"""Which questions a step asks in place of the drawn ones, and what happens where they cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from collect_case import collector, half_right

from perl_megatron.data.question_stream import QuestionStream
from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.errors import UserError
from perl_megatron.runtime import collective


def test_questions_about_the_order_take_the_place_of_others_unless_images_look_the_same() -> None:
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
    twins = (Path("a.png"), Path("a.jpg"))
    same = [replace(record, images=twins) for record in groups.questions.records]
    groups.questions = QuestionStream(same, ShuffledSampler(10, 0))
    groups._ask(fresh := groups._draw(4, 0, 0), step=0, alpha=1.0)
    assert [question.record for question in fresh] == [same[int(question.record.id[1:])] for question in fresh]


def test_an_image_that_only_another_rank_cannot_read_ends_this_one_before_it_samples(monkeypatch) -> None:
    groups, engine = collector(half_right)
    gone = UserError("image file not found", where="a.png")
    monkeypatch.setattr(collective, "world_size", lambda: 2)
    monkeypatch.setattr(collective, "gather_objects", lambda mine: [mine, gone])
    with pytest.raises(UserError, match="image file not found"):
        groups.collect(step=0, alpha=1.0)
    assert engine.seeds == []
