"""Whose log-probabilities the loop trains on, with an actor that only takes notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from perl_megatron.config.schema import Config
from perl_megatron.drawn import Drawn, DrawnQuestion
from perl_megatron.errors import UserError
from perl_megatron.loop import train
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.types import EncodedPrompt, Group, Record, Rollout, View

SAMPLED = np.array([-1.0, -2.0, -0.5], np.float32)
GAP = np.array([0.1, -1.0, 1.5], np.float32)
"""log π_old - log π_rollout of each token: ratios of about 1.1, 0.37 and 4.5."""


class NotingActor:
    """Gives made-up log-probabilities, and keeps what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.batches: list[list[TrainingSequence]] = []

    def log_probs(self, sequences: list[TrainingSequence]) -> list[np.ndarray]:
        self.calls.append("log_probs")
        return [SAMPLED + GAP for _ in sequences]

    def reference_log_probs(self, sequences: list[TrainingSequence]) -> list[np.ndarray]:
        self.calls.append("reference_log_probs")
        return [SAMPLED - 1 for _ in sequences]

    def update(self, sequences: list[TrainingSequence]) -> dict[str, float]:
        self.calls.append("update")
        self.batches.append(sequences)
        return {"loss": 0.0}


def drawn_group() -> Drawn:
    record = Record("r", (), "?", "7")
    rollouts = [
        Rollout(
            0,
            np.arange(3),
            SAMPLED.copy(),
            "stop",
            "",
            np.zeros(3, np.int64),
            {"accuracy": reward, "format": 1.0},
            reward,
        )
        for reward in (0.0, 1.0)
    ]
    prompt = EncodedPrompt(np.array([1]), (1,), (), np.zeros((0, 3), np.int64), ())
    group = Group(record, (View("r", 0, (), (), "?", "7", "number"),), (prompt,), rollouts)
    return Drawn(0, [DrawnQuestion(record, 0, 0, 0, group, "kept", "kept")])


def make_session(actor: NotingActor, drawn: Drawn, **algorithm: Any) -> SimpleNamespace:
    """Of one step."""
    config = Config.model_validate({"model": {"path": "unused"}, "run": {"steps": 1}, "algorithm": algorithm})

    def ignore(*args: Any) -> None:
        pass

    return SimpleNamespace(
        config=config,
        actor=actor,
        update=lambda step, sequences: actor.update(sequences),
        collector=SimpleNamespace(collect=lambda step, alpha: drawn),
        phases=lambda name, **facts: nullcontext(),
        position=dict,
        saved_on_user_error=lambda step: nullcontext(),
        restore=lambda: 0,
        stop_requested=lambda: False,
        owes_evaluation=lambda step: step == 0,
        await_rollouts=ignore,
        sync_weights=ignore,
        rest_engine=ignore,
        evaluate=ignore,
        log_step=ignore,
        save_and_evaluate_if_due=ignore,
        finish=ignore,
    )


def run(**algorithm: Any) -> tuple[NotingActor, list[Rollout]]:
    """One step of training."""
    actor, drawn = NotingActor(), drawn_group()
    train(make_session(actor, drawn, **algorithm))  # type: ignore[arg-type]
    return actor, drawn.kept[0].rollouts


def test_steps_are_saved_where_an_update_of_the_engine_fails() -> None:
    session, saved = make_session(NotingActor(), drawn_group()), []

    @contextmanager
    def saved_on_user_error(step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            saved.append(step)
            raise

    def fail(step: int) -> None:
        raise UserError("the engine holds other numbers")

    session.saved_on_user_error, session.sync_weights = saved_on_user_error, fail
    with pytest.raises(UserError, match="other numbers"):
        train(session)  # type: ignore[arg-type]
    assert saved == [0]


def test_by_default_the_trainer_recomputes_and_nothing_is_weighted() -> None:
    actor, rollouts = run()
    assert actor.calls == ["log_probs", "reference_log_probs", "update"]
    for sequence, rollout in zip(actor.batches[0], rollouts, strict=True):
        assert sequence.logprob_old is rollout.logprob_old
        assert sequence.logprob_old.tolist() == (SAMPLED + GAP).tolist()
        assert sequence.importance is None
    assert [sequence.advantage for sequence in actor.batches[0]] == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-5)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.01])
def test_the_engines_log_probabilities_save_the_forward_pass(kl_coefficient: float) -> None:
    actor, rollouts = run(old_policy="engine", kl_coefficient=kl_coefficient)
    assert actor.calls == ["reference_log_probs"] * (kl_coefficient > 0) + ["update"]
    for sequence, rollout in zip(actor.batches[0], rollouts, strict=True):
        assert sequence.logprob_old is rollout.logprob_rollout
        assert rollout.logprob_old is None  # the trainer's: never computed, and not claimed to be
        assert sequence.importance is None


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"importance_correction": "truncated"}, [np.exp(0.1), np.exp(-1.0), 2.0]),
        ({"importance_correction": "masked"}, [np.exp(0.1), 0.0, 0.0]),
        ({"importance_correction": "masked", "importance_low": 0.1, "importance_high": 5.0}, np.exp(GAP).tolist()),
        ({"importance_correction": "truncated", "importance_level": "sequence"}, [np.exp(0.6)] * 3),
        (
            {"importance_correction": "masked", "importance_level": "sequence", "importance_high": 1.5},
            [0.0] * 3,
        ),
    ],
)
def test_the_update_gets_the_weights_that_are_asked_for(settings: dict[str, Any], weights: list[float]) -> None:
    actor, _ = run(**settings)
    for sequence in actor.batches[0]:
        assert sequence.importance is not None
        assert sequence.importance.tolist() == pytest.approx(weights, rel=1e-6)
        assert sequence.logprob_old is not None
        assert sequence.logprob_old.tolist() == (SAMPLED + GAP).tolist()
