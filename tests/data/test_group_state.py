"""Groups through JSON: what a checkpoint keeps comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from perl_megatron.data.group_state import group_from_json, group_to_json
from perl_megatron.data.permutation import apply_order
from perl_megatron.types import (
    AnswerRule,
    EncodedPrompt,
    Grading,
    Group,
    PermutationContract,
    Record,
    ReferenceRule,
    Rollout,
    View,
)

RECORD = Record(
    id="é",
    images=(Path("/data/a.png"), Path("b.png"), Path("c.png")),
    text="<image><image><image>Which is like image 1?\n(A) image 2\n(B) image 3\n(C) neither",
    answer="B",
    answer_type="choice",
    kind="likeness",
    contract=PermutationContract((1, 2), (ReferenceRule.INDEX,), AnswerRule.OPTION_LETTER, (1, 2, None)),
    source="train.jsonl:7",
    grading=Grading(("image 2", "image 3", "neither"), relative_tolerance=0.1),
)


def encode(view: View) -> EncodedPrompt:
    return EncodedPrompt(np.arange(len(view.text)), (), (), np.zeros((0, 3), np.int64), (view.answer,))


def rollout(view_index: int, seed: int) -> Rollout:
    random = np.random.default_rng(seed)
    return Rollout(
        view_index,
        random.integers(0, 150_000, seed),
        -random.exponential(size=seed).astype(np.float32),
        "stop" if seed % 2 else "length",
        'a "quoted"\u2028 answer',
        np.full(seed, seed, np.int64),
        {"accuracy": 1 / 3, "format": 0.0},
        0.1 + 0.2,
        readable=seed % 2 == 0,
    )


def test_a_group_comes_back_bit_for_bit() -> None:
    views = tuple(apply_order(RECORD, order, index) for index, order in enumerate([(0, 1, 2), (0, 2, 1)]))
    group = Group(RECORD, views, tuple(map(encode, views)), [rollout(0, 5), rollout(1, 0), rollout(1, 8)])
    back = group_from_json(json.loads(json.dumps(group_to_json(group))), encode)
    assert (back.record, back.views) == (group.record, group.views)
    assert back.views[1].answer == "A"
    for mine, other in zip(back.prompts, group.prompts, strict=True):
        np.testing.assert_equal(vars(mine), vars(other))
    for mine, other in zip(back.rollouts, group.rollouts, strict=True):
        np.testing.assert_equal(vars(mine), vars(other))
        assert [getattr(mine, name).dtype for name in ("token_ids", "logprob_rollout")] == [np.int64, np.float32]
        mine.logprob_rollout += 1  # not a read-only view of the bytes


def test_a_group_that_was_trained_on_does_not_wait() -> None:
    trained = rollout(0, 3)
    trained.advantage = 0.0
    with pytest.raises(AssertionError, match="not trained on yet"):
        group_to_json(Group(RECORD, (), (), [trained]))
