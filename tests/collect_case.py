"""Groups from questions, with an engine whose answers the test decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from perl_megatron.collect import GroupCollector
from perl_megatron.config.schema import Config
from perl_megatron.data.question_stream import QuestionStream
from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.data.wait_clock import WaitClock
from perl_megatron.drawn import Drawn, ledger_rows
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

    def __init__(self) -> None:
        self.waits = WaitClock()
        self.take_waits = self.waits.take

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


CARRY = {
    "filter": {"oversample": 2.0, "carry_surplus": True},
    "algorithm": {"importance_correction": "truncated"},
}


def decisions(drawn: Drawn) -> list[tuple[int, str, str]]:
    return [(row["draw"], row["decision"], row["reason"]) for row in ledger_rows(drawn)]
