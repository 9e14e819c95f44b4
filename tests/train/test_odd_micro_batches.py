"""Micro-batches of unusual images in one process against transformers in float64 (two ranks: tests/distributed)."""

import numpy as np
import pytest
from actor_case import (
    GRADIENT_STEP,
    ODD_VIEWS,
    gradient,
    make_config,
    make_odd_sequences,
    weights_of,
    with_log_probs,
)
from actor_yardstick import expect_of

from perl_megatron.kernels.scores import ScoreOptions
from perl_megatron.train import optimizer, scorer
from perl_megatron.train.actor import Actor


@pytest.fixture
def start(case, topology, encoder):
    """An actor and the sequences of a kind, with disturbed log-probabilities."""

    def start(kind, **sections):
        actor = Actor(make_config(case, **sections), topology, encoder, total_steps=10)
        sequences = make_odd_sequences(case, encoder, kind)
        log_probs = actor.log_probs(sequences)
        return actor, with_log_probs(sequences, log_probs, log_probs, noise=0.5)

    return start


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", ODD_VIEWS)
def test_log_probabilities_and_gradient(case, encoder, start, kind, recompute):
    actor, batch = start(kind, optimizer=GRADIENT_STEP, model={"recompute": recompute})
    expected = expect_of(case, encoder, batch, actor.config)
    expected.check_log_probs(np.concatenate(actor.log_probs(batch)))
    before = weights_of(actor)
    metrics = actor.update(batch)
    steps = gradient(before, weights_of(actor))
    expected.check_step(steps, metrics["gradient_norm"])
    moved = {name for name, step in steps.items() if step.any()}
    assert moved == {name for name in steps if kind != "none" or not name.startswith("visual.")}


def test_images_may_stay_away_after_the_first_update(start):
    """Would fail if the gradient reduction overlapped the backward pass, as the next test shows."""
    actor, batch = start("mixed")
    actor.update(batch)
    assert actor.update(without_images(batch))["gradient_norm"] > 0


def test_overlapped_gradient_reduction_does_not_survive_a_share_without_images(start, monkeypatch):
    """Why it is off: trap 7. A bucket's reduction is started by the last parameter that gets its gradient.

    Which parameters it waits for is learnt in the first update, and the vision tower's then never come. (It would also
    need the output weight's gradient from autograd, which here goes straight to the buffer.)
    """
    config = optimizer.DistributedDataParallelConfig

    def overlapping(**options):
        return config(**{**options, "overlap_grad_reduce": True})

    def through_autograd(**options):
        return ScoreOptions(**{**options, "gradient_buffer": None})

    monkeypatch.setattr(optimizer, "DistributedDataParallelConfig", overlapping)
    actor, batch = start("mixed")
    with pytest.raises(AssertionError, match="not safe when overlap_grad_reduce is True"):
        actor.update(batch)
    monkeypatch.setattr(scorer, "ScoreOptions", through_autograd)
    actor, batch = start("mixed")
    actor.update(batch)
    with pytest.raises(AssertionError, match="Communication call has not been issued"):
        actor.update(without_images(batch))


def without_images(batch):
    return [sequence for sequence in batch if not sequence.prompt.image_keys]
