"""The actor in one process against transformers in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from actor_case import (
    GRADIENT_STEP,
    Reference,
    gradient,
    make_config,
    norm,
    weights_of,
    with_log_probs,
    worst_relative_error,
)

from perl_megatron.train.actor import Actor

CLIPPED_ADAM = {"learning_rate": 1e-3, "epsilon": 1e-3, "weight_decay": 0.1, "clip_gradient": 0.5}


@pytest.fixture
def start(case, topology, encoder):
    def start(total_steps=10, **sections):
        return Actor(make_config(case, **sections), topology, encoder, total_steps=total_steps)

    return start


@pytest.fixture
def reference(case, encoder):
    return Reference(case, encoder)


def scored(actor, sequences, *, noise=0.5):
    return with_log_probs(sequences, actor.log_probs(sequences), actor.reference_log_probs(sequences), noise=noise)


def expected_gradient(reference, loss):
    reference.model.zero_grad()
    loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in reference.named()}


@pytest.mark.parametrize("sharing", ["full", "vision", "none"])
def test_log_probabilities_are_those_of_the_sampling_distribution(start, sequences, reference, sharing):
    found = start(actor={"sharing": sharing}).log_probs(sequences)
    for sequence, values in zip(sequences, found, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, reference.log_prob(sequence).detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_loss_and_gradient_of_an_update(start, sequences, reference, aggregation):
    actor = start(optimizer=GRADIENT_STEP, algorithm={"aggregation": aggregation})
    batch = scored(actor, sequences)
    before = weights_of(actor)
    metrics = actor.update(batch)
    loss = reference.policy_loss(batch, actor.config)
    expected = expected_gradient(reference, loss)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(norm(expected), rel=1e-5)
    assert worst_relative_error(gradient(before, weights_of(actor)), expected) < 1e-5
    for bound in ("low", "high", "dual"):
        assert metrics[f"clip_fraction_{bound}"] > 0, "the case has to meet every bound"
    assert metrics["num_tokens"] == sum(len(sequence.response) for sequence in sequences)
    assert metrics["num_sequences"] == len(sequences)


def test_no_split_into_micro_batches_changes_the_gradient(start, sequences):
    found = {}
    for size in (1, 100, 10_000):
        actor = start(optimizer=GRADIENT_STEP, actor={"micro_batch_tokens": size})
        batch = with_log_probs(sequences, *[[np.full(len(s.response), -5.0) for s in sequences]] * 2, noise=0.5)
        before = weights_of(actor)
        metrics = actor.update(batch)
        found[size] = metrics, gradient(before, weights_of(actor))
    for size in (1, 100):
        assert found[size][0] == pytest.approx(found[10_000][0], rel=1e-5)
        assert worst_relative_error(found[size][1], found[10_000][1]) < 1e-5


def test_the_ratio_of_the_first_update_is_one(start, sequences):
    actor = start()
    metrics = actor.update(scored(actor, sequences, noise=0.0))
    assert metrics["ratio_max"] == 1
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-12)
    assert metrics["kl"] == pytest.approx(0, abs=1e-12)
    assert actor.update(scored(start(), sequences, noise=0.0))["ratio_max"] > 1.001, "the weights have moved"


def test_three_updates_equal_adamw_with_clipping_decay_and_warm_up(start, sequences, reference):
    actor = start(optimizer={**CLIPPED_ADAM, "warmup_steps": 2})
    initial = weights_of(actor)
    batch = scored(actor, sequences)
    groups = [
        {"params": [p for _, p in reference.named() if p.dim() > 1], "weight_decay": CLIPPED_ADAM["weight_decay"]},
        {"params": [p for _, p in reference.named() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=CLIPPED_ADAM["epsilon"])
    rates = []
    for rate in (5e-4, 1e-3, 1e-3):
        metrics = actor.update(batch)
        rates.append(metrics["learning_rate"])
        expected_gradient(reference, reference.policy_loss(batch, actor.config))
        total = torch.nn.utils.clip_grad_norm_([p for _, p in reference.named()], CLIPPED_ADAM["clip_gradient"])
        assert metrics["gradient_norm"] == pytest.approx(total.item(), rel=1e-4)
        assert total > CLIPPED_ADAM["clip_gradient"], "the case has to be clipped"
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
    assert rates == [5e-4, 1e-3, 1e-3]
    found = weights_of(actor)
    for name, parameter in reference.named():
        expected = parameter.detach().numpy()
        moved = np.abs(expected - initial[name]).max()
        assert moved > 1e-5, "the case has to move every weight"
        rounding = 3 * np.spacing(np.abs(initial[name]).max())  # three float32 additions
        assert np.abs(found[name] - expected).max() < 1e-3 * moved + rounding, name


def test_a_supervised_update_is_token_cross_entropy(start, sequences, reference):
    actor = start(optimizer=GRADIENT_STEP)
    before = weights_of(actor)
    metrics = actor.supervised_update(sequences)
    loss = reference.supervised_loss(sequences)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = expected_gradient(reference, loss)
    assert worst_relative_error(gradient(before, weights_of(actor)), expected) < 1e-5


def test_the_reference_stays_and_leaves_no_trace(start, sequences):
    actor = start()
    initial = actor.reference_log_probs(sequences)
    actor.update(scored(actor, sequences))
    weights, log_probs = weights_of(actor), actor.log_probs(sequences)
    again = actor.reference_log_probs(sequences)
    assert all(np.array_equal(a, b) for a, b in zip(initial, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(log_probs, again, strict=True))
    assert all(np.array_equal(value, weights[name]) for name, value in weights_of(actor).items())
    assert all(np.array_equal(a, b) for a, b in zip(log_probs, actor.log_probs(sequences), strict=True))


def test_without_images_the_vision_tower_gets_no_gradient(start, sequences):
    actor = start(optimizer=GRADIENT_STEP)
    text_only = [sequence for sequence in sequences if not sequence.prompt.image_keys]
    assert text_only
    before = weights_of(actor)
    actor.update(scored(actor, text_only))
    after = weights_of(actor)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("visual.")}


def test_an_update_without_finite_gradient_is_skipped(start, sequences):
    actor = start()
    good = scored(actor, sequences)
    bad = [replace(good[0], advantage=float("nan")), *good[1:]]
    actor.update(good)
    weights = weights_of(actor)
    metrics = actor.update(bad)
    assert metrics["skipped_updates"] == 1
    assert all(np.array_equal(value, weights[name]) for name, value in weights_of(actor).items())
    assert actor.update(good)["skipped_updates"] == 0


def test_a_loss_that_is_not_finite_is_enough(start, sequences):
    """The bounds of the ratio cut the gradient of a NaN to 0, so that only the loss shows it."""
    actor = start()
    good = scored(actor, sequences)
    bad = [replace(good[0], logprob_old=np.full_like(good[0].logprob_old, np.nan)), *good[1:]]
    weights = weights_of(actor)
    metrics = actor.update(bad)
    assert np.isnan(metrics["loss"])
    assert np.isfinite(metrics["gradient_norm"])
    assert metrics["skipped_updates"] == 1
    assert all(np.array_equal(value, weights[name]) for name, value in weights_of(actor).items())


def test_gradients_leave_the_weights_alone(start, sequences):
    actor = start()
    good = scored(actor, sequences)
    weights = weights_of(actor)
    measured = actor.gradients(good)
    assert all(np.array_equal(value, weights[name]) for name, value in weights_of(actor).items())
    updated = actor.update(good)
    assert (measured["loss"], measured["gradient_norm"]) == (updated["loss"], updated["gradient_norm"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.7, 0.4, 0.1]),
        ("cosine", [0.5, 1.0, 0.775, 0.325, 0.1]),
    ],
)
def test_learning_rates(start, sequences, schedule, expected):
    rates = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "schedule": schedule, "warmup_steps": 2}
    actor = start(total_steps=5, optimizer=rates)
    found = [actor.supervised_update(sequences[-1:])["learning_rate"] for _ in expected]
    assert found == pytest.approx([1e-3 * factor for factor in expected])


def test_bfloat16_is_close(start, sequences, reference):
    actor = start(model={"dtype": "bfloat16"})
    found = np.concatenate(actor.log_probs(sequences))
    expected = np.concatenate([reference.log_prob(sequence).detach().numpy() for sequence in sequences])
    assert 1e-4 < np.abs(found - expected).max() < 0.1
    batch = scored(actor, sequences)
    metrics = actor.update(batch)
    expected_norm = norm(expected_gradient(reference, reference.policy_loss(batch, actor.config)))
    assert metrics["gradient_norm"] == pytest.approx(expected_norm, rel=0.05)
