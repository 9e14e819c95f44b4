"""CISPO against hand-computed cases, a literal NumPy transcription of its gradient, and the clipped objective."""

import math

import numpy as np
import pytest
import torch

from perl_megatron.algorithm.objective import cispo_objective, clipped_objective, token_log_ratio


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "weight", "bound"),
    [
        (1.0, 2.0, None, 1.0, None),
        (9.0, 2.0, None, 5.0, "clipped_high"),
        (9.0, -2.0, None, 5.0, "clipped_high"),
        (0.01, 2.0, None, 0.01, None),
        (0.01, -2.0, 0.4, 0.6, "clipped_low"),
        (0.01, 2.0, 0.4, 0.6, "clipped_low"),
        (9.0, 0.0, 0.4, 5.0, None),
    ],
)
def test_hand_computed(ratio, advantage, low, weight, bound):
    logprob, old = tensor(-0.5).requires_grad_(), tensor(-0.5 - math.log(ratio))
    result = cispo_objective(logprob, token_log_ratio(logprob, old), tensor(advantage), low=low, high=4.0)
    assert result.loss.item() == pytest.approx(-weight * advantage * -0.5, rel=1e-13)
    assert result.ratio.item() == pytest.approx(ratio, rel=1e-13)
    for name in ("clipped_low", "clipped_high", "clipped_dual"):
        assert getattr(result, name).item() is (name == bound), name
    result.loss.sum().backward()
    # A bound limits the gradient, and never takes it away.
    assert logprob.grad.item() == pytest.approx(-weight * advantage, rel=1e-13)


def test_transcription():
    random = np.random.default_rng(0)
    new, old, advantage = random.normal(-1, 1, 500), random.normal(-1, 1, 500), random.normal(0, 1, 500)
    weight = np.clip(np.exp(new - old), 1 - 0.3, 1 + 0.5)
    logprob = torch.from_numpy(new).requires_grad_()
    log_ratio = token_log_ratio(logprob, torch.from_numpy(old))
    result = cispo_objective(logprob, log_ratio, torch.from_numpy(advantage), low=0.3, high=0.5)
    np.testing.assert_allclose(result.loss.detach().numpy(), -weight * advantage * new, rtol=1e-13)
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprob)
    np.testing.assert_allclose(gradient.numpy(), -weight * advantage, rtol=1e-13)
    assert result.clipped_low.any()
    assert result.clipped_high.any()


def test_within_its_bounds_the_gradient_is_that_of_the_clipped_objective():
    random = np.random.default_rng(1)
    logprob = torch.from_numpy(random.normal(-1, 0.1, 50)).requires_grad_()
    old, advantage = logprob.detach() + 0.01, torch.from_numpy(random.normal(0, 1, 50))
    log_ratio = token_log_ratio(logprob, old)
    ours = cispo_objective(logprob, log_ratio, advantage, low=None, high=4.0)
    clipped = clipped_objective(log_ratio, advantage, clip_low=0.2, clip_high=0.2, dual_clip=None)
    (found,) = torch.autograd.grad(ours.loss.sum(), logprob, retain_graph=True)
    (expected,) = torch.autograd.grad(clipped.loss.sum(), logprob)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
def test_extreme_ratio_stays_finite_in_float32(log_ratio):
    logprob = torch.tensor([log_ratio, -1.0]).requires_grad_()
    ratio = token_log_ratio(logprob, torch.tensor([0.0, -1.0]))
    result = cispo_objective(logprob, ratio, torch.tensor([1.0, 1.0]), low=None, high=4.0)
    result.loss.sum().backward()
    assert result.loss.isfinite().all()
    assert logprob.grad[1] == -1.0
    assert logprob.grad[0] == pytest.approx(-5.0 if log_ratio > 0 else 0.0, abs=1e-8)
