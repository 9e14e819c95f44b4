"""Clipped objective and KL estimators: hand-computed cases, a literal NumPy transcription, gradients."""

import math

import numpy as np
import pytest
import torch

from perl_megatron.algorithm.objective import clipped_objective, kl_estimate, sequence_log_ratio, token_log_ratio

CLIP = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def transcription(logprob, logprob_old, advantage, *, clip_low, clip_high, dual_clip):
    """PPO's min and Ye et al.'s max, word by word."""
    ratio = np.exp(logprob - logprob_old)
    objective = np.minimum(ratio * advantage, np.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        objective = np.where(advantage < 0, np.maximum(objective, dual_clip * advantage), objective)
    return -objective


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "bound"),
    [
        (1.0, 2.0, -2.0, None),
        (1.5, 2.0, -2.6, "clipped_high"),
        (0.5, 2.0, -1.0, None),
        (0.5, -2.0, 1.6, "clipped_low"),
        (2.0, -2.0, 4.0, None),
        (5.0, -2.0, 6.0, "clipped_dual"),
        (5.0, 0.0, 0.0, None),
    ],
)
def test_hand_computed(ratio, advantage, loss, bound):
    logprob = tensor(math.log(ratio)).requires_grad_()
    result = clipped_objective(logprob, tensor(advantage), **CLIP)
    assert result.loss.item() == pytest.approx(loss, rel=1e-14)
    assert result.ratio.item() == pytest.approx(ratio, rel=1e-14)
    for name in ("clipped_low", "clipped_high", "clipped_dual"):
        assert getattr(result, name).item() is (name == bound), name
    result.loss.sum().backward()
    # ∂(-A ρ)/∂ logprob = -A ρ, and nothing where a bound holds.
    assert logprob.grad.item() == pytest.approx(0.0 if bound else -advantage * ratio, rel=1e-14)


@pytest.mark.parametrize("dual_clip", [None, 1.5, 3.0])
def test_transcription(dual_clip):
    rng = np.random.default_rng(0)
    logprob, logprob_old, advantage = rng.normal(-1, 1, 2000), rng.normal(-1, 1, 2000), rng.normal(0, 1, 2000)
    options = CLIP | {"dual_clip": dual_clip}
    expected = transcription(logprob, logprob_old, advantage, **options)
    log_ratio = token_log_ratio(torch.from_numpy(logprob), torch.from_numpy(logprob_old))
    result = clipped_objective(log_ratio, torch.from_numpy(advantage), **options)
    np.testing.assert_allclose(result.loss.numpy(), expected, rtol=1e-13)
    assert result.clipped_low.any()
    assert result.clipped_high.any()
    assert result.clipped_dual.any().item() is (dual_clip is not None)


def test_gradcheck():
    generator = torch.Generator().manual_seed(1)
    logprob = torch.randn(24, generator=generator, dtype=torch.float64).requires_grad_()
    old = torch.randn(24, generator=generator, dtype=torch.float64)
    advantage = torch.randn(24, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: clipped_objective(token_log_ratio(x, old), advantage, **CLIP).loss, (logprob,)
    )


def test_only_the_policy_is_differentiated():
    logprob, old, advantage = (tensor(0.1).requires_grad_() for _ in range(3))
    clipped_objective(token_log_ratio(logprob, old), advantage, **CLIP).loss.sum().backward()
    assert old.grad is None
    assert advantage.grad is None


@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_extreme_ratio_stays_finite_in_float32(log_ratio, advantage, dual_clip):
    logprob = torch.tensor([log_ratio, -1.0]).requires_grad_()
    options = CLIP | {"dual_clip": dual_clip}
    log_ratio = token_log_ratio(logprob, torch.tensor([0.0, -1.0]))
    result = clipped_objective(log_ratio, torch.tensor([advantage, 1.0]), **options)
    result.loss.sum().backward()
    assert result.loss.isfinite().all()
    assert logprob.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_kl_hand_computed(estimator, expected):
    # π_θ = 0.5, π_ref = 0.25: r = 0.5.
    actual = kl_estimate(tensor(math.log(0.5)), tensor(math.log(0.25)), estimator)
    assert actual.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradcheck(estimator):
    generator = torch.Generator().manual_seed(2)
    logprob = torch.randn(32, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(32, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, reference, estimator), (logprob,))


def exact_kl_case():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    return logits, reference


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    logits, reference = exact_kl_case()
    logprob = logits.log_softmax(0)
    exact = (logprob.exp() * (logprob - reference)).sum()
    expectation = (logprob.exp() * kl_estimate(logprob, reference, estimator)).sum()
    assert expectation.item() == pytest.approx(exact.item(), rel=1e-13)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_gradients_are_as_documented(estimator):
    logits, reference = exact_kl_case()
    logprob = logits.log_softmax(0)
    exact = {
        "k1": 0 * logits.sum(),
        "k2": (logprob.exp() * (logprob - reference)).sum(),
        "k3": (reference.exp() * (reference - logprob)).sum(),
    }[estimator]
    expectation = (logprob.exp().detach() * kl_estimate(logprob, reference, estimator)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (actual,) = torch.autograd.grad(expectation, logits)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def test_k3_is_accurate_near_zero_and_finite_far_away():
    # k3 ≈ x²/2 for small x = log r; a float32 `exp(x) - 1 - x` is wrong by up to 20 % here.
    small = kl_estimate(torch.tensor([0.0]), torch.tensor([1e-3]), "k3")
    assert small.item() == pytest.approx(math.expm1(1e-3) - 1e-3, rel=2e-3)
    far = torch.tensor([-200.0, 200.0]).requires_grad_()
    estimate = kl_estimate(far, torch.zeros(2), "k3")
    estimate.sum().backward()
    assert estimate.isfinite().all()
    assert far.grad.tolist() == [0.0, 0.0]


RESPONSES = (3, 1, 4)
ROW = torch.tensor([row for row, length in enumerate(RESPONSES) for _ in range(length)])


def objective_by_response(logprob, old, advantages, *, mean, **clip):
    """(1/N) Σ_i of one clipped term for each response, literally."""
    terms = []
    for row, advantage in enumerate(advantages):
        log_ratio = (logprob - old)[row == ROW].sum()
        ratio = (log_ratio / RESPONSES[row] if mean else log_ratio).exp()
        bounded = ratio.clamp(1 - clip["clip_low"], 1 + clip["clip_high"])
        term = torch.minimum(ratio * advantage, bounded * advantage)
        terms.append(torch.maximum(term, clip["dual_clip"] * advantage) if advantage < 0 else term)
    return -torch.stack(terms).mean()


@pytest.mark.parametrize("mean", [True, False], ids=["GSPO", "PeRL Eq. 6"])
@pytest.mark.parametrize("scale", [0.01, 0.2, 2.0], ids=["no bound holds", "some do", "most do"])
def test_a_responses_ratio_has_value_and_gradient_of_one_term_for_each_response(mean, scale):
    generator = torch.Generator().manual_seed(5)
    old = torch.randn(8, generator=generator, dtype=torch.float64)
    logprob = (old + scale * torch.randn(8, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = tensor(1.5, -0.5, -2.0)
    expected = objective_by_response(logprob, old, advantages, mean=mean, **CLIP)
    lengths = torch.tensor(RESPONSES)[ROW]
    tokens = token_log_ratio(logprob, old)
    totals = torch.zeros(3, dtype=torch.float64).index_add(0, ROW, tokens)
    log_ratio = sequence_log_ratio(tokens, totals[ROW], lengths, mean=mean)
    token = clipped_objective(log_ratio, advantages[ROW], **CLIP)
    found = (token.loss / (3 * lengths)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)
    (gradient,) = torch.autograd.grad(found, logprob)
    (right,) = torch.autograd.grad(expected, logprob)
    torch.testing.assert_close(gradient, right, rtol=1e-13, atol=1e-16)
    for row in range(3):
        assert len(token.ratio[row == ROW].unique()) == 1
