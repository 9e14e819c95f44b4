"""What the loop conditions log-probabilities on, and where the KL goes, with an actor that only takes notes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_loop import SAMPLED, NotingActor, make_session

from perl_megatron.algorithm.objective import kl_penalty
from perl_megatron.drawn import Drawn, DrawnQuestion
from perl_megatron.loop import train
from perl_megatron.types import EncodedPrompt, Group, Record, Rollout, View

PROMPTS = tuple(EncodedPrompt(np.array([n]), (n,), (), np.zeros((0, 3), np.int64), ()) for n in (10, 11))


class DistantActor(NotingActor):
    """The reference is at another distance from the policy for every response."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[EncodedPrompt]] = {}

    def log_probs(self, sequences: list[Any]) -> list[np.ndarray]:
        self.seen["log_probs"] = [sequence.prompt for sequence in sequences]
        return super().log_probs(sequences)

    def reference_log_probs(self, sequences: list[Any]) -> list[np.ndarray]:
        self.calls.append("reference_log_probs")
        self.seen["reference_log_probs"] = [sequence.prompt for sequence in sequences]
        return [SAMPLED - 0.5 * number for number, _ in enumerate(sequences)]


def run(**algorithm: Any) -> tuple[DistantActor, list[Rollout]]:
    """One step over a question with an original and a permuted view, two responses each."""
    views = tuple(View("r", index, order, (), "?", "7", "number") for index, order in enumerate([(0, 1), (1, 0)]))
    rollouts = [
        Rollout(
            view, np.arange(3), SAMPLED.copy(), "stop", "", np.zeros(3, np.int64), {"accuracy": a, "format": 1.0}, a
        )
        for view, a in ((0, 1.0), (0, 0.0), (1, 0.0), (1, 1.0))
    ]
    record = Record("r", (), "?", "7")
    group = Group(record, views, PROMPTS, rollouts)
    actor, drawn = DistantActor(), Drawn(0, [DrawnQuestion(record, 0, 0, 0, group, "kept", "kept")])
    train(make_session(actor, drawn, **algorithm))  # type: ignore[arg-type]
    return actor, rollouts


@pytest.mark.parametrize(("loss_view", "prompts"), [("own", (0, 0, 1, 1)), ("original", (0, 0, 0, 0))])
def test_every_log_probability_is_conditioned_on_the_view_that_is_asked_for(
    loss_view: str, prompts: tuple[int, ...]
) -> None:
    actor, rollouts = run(loss_view=loss_view)
    expected = [PROMPTS[index] for index in prompts]
    assert actor.seen == {"log_probs": expected, "reference_log_probs": expected}
    assert [sequence.prompt for sequence in actor.batches[0]] == expected
    assert [rollout.view_index for rollout in rollouts] == [0, 0, 1, 1]


def test_by_default_the_kl_is_left_to_the_loss() -> None:
    actor, rollouts = run()
    assert all(rollout.kl_penalty is None for rollout in rollouts)
    assert actor.batches[0][0].logprob_ref is not None


@pytest.mark.parametrize("old_policy", ["trainer", "engine"])
def test_the_kl_is_taken_off_the_reward_before_the_advantage(old_policy: str) -> None:
    """π_old is 0.6 nats above the engine's over the three tokens, and the reference 1.5 · number below it (k1)."""
    settings = {"kl_in": "reward", "kl_estimator": "k1", "kl_coefficient": 0.1, "standardize": False}
    actor, rollouts = run(old_policy=old_policy, **settings)
    above = 0.6 if old_policy == "trainer" else 0.0
    penalties = np.array([0.1 * (above + 1.5 * number) for number in range(4)])
    assert [rollout.kl_penalty for rollout in rollouts] == pytest.approx(list(penalties), rel=1e-6)
    assert [rollout.reward for rollout in rollouts] == [1.0, 0.0, 0.0, 1.0]
    less = np.array([1.0, 0.0, 0.0, 1.0]) - penalties
    expected = list(less - less.mean())
    assert [sequence.advantage for sequence in actor.batches[0]] == pytest.approx(expected, rel=1e-6)
    assert actor.calls[-2:] == ["reference_log_probs", "update"]


@pytest.mark.parametrize(
    ("estimator", "of_tokens"), [("k1", -0.2 + 0.5), ("k2", 0.02 + 0.125), ("k3", 0.0214027582 + 0.1065306597)]
)
def test_the_penalty_by_hand(estimator: Any, of_tokens: float) -> None:
    """log r = 0.2 and -0.5 of the two tokens."""
    found = kl_penalty(np.array([-1.0, -1.0]), np.array([-0.8, -1.5]), coefficient=2.0, estimator=estimator)
    assert found == pytest.approx(2 * of_tokens, rel=1e-8)


def test_an_empty_response_has_no_penalty() -> None:
    assert kl_penalty(np.zeros(0), np.zeros(0), coefficient=1.0, estimator="k1") == 0.0
