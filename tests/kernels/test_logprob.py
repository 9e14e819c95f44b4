import pytest
import torch

from perl_megatron.kernels.logprob import vocabulary_parallel_log_prob


def make(dtype=torch.float64, tokens=7, vocabulary=23, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    return logits, torch.randint(0, vocabulary, (tokens,), generator=generator)


def definition(logits, targets, temperature=1.0, banned=()):
    bias = torch.zeros(logits.shape[1], dtype=logits.dtype)
    bias[list(banned)] = -100.0
    log_p = ((logits + bias) / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.7, (0, 5, 22)), (2.5, (3,))])
def test_equals_the_definition(temperature, banned):
    logits, targets = make()
    ours = vocabulary_parallel_log_prob(logits, targets, temperature=temperature, banned_token_ids=banned)
    for own, expected in zip(ours, definition(logits, targets, temperature, banned), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-13, atol=1e-13)


def test_gradients_of_both_outputs():
    logits, targets = make(tokens=4, vocabulary=9)
    logits.requires_grad_()

    def function(x):
        return vocabulary_parallel_log_prob(x, targets, temperature=0.8, banned_token_ids=(2,))

    assert torch.autograd.gradcheck(function, (logits,))


def test_float32_is_as_good_as_torch_and_bfloat16_is_read_as_float32():
    logits, targets = make(torch.float32, tokens=64, vocabulary=501)
    exact = definition(logits.double(), targets)
    for own, plain, true in zip(
        vocabulary_parallel_log_prob(logits, targets), definition(logits, targets), exact, strict=True
    ):
        assert (own - true).abs().max() <= 2 * (plain - true).abs().max()
    low = logits.bfloat16()
    for own, true in zip(vocabulary_parallel_log_prob(low, targets), definition(low.double(), targets), strict=True):
        assert own.dtype == torch.float32
        assert (own - true).abs().max() <= 1e-5


def test_large_logits_and_rows_that_fill_up_the_vocabulary_stay_finite():
    logits, targets = make(torch.float32)
    logits = torch.cat([logits * 1e4, torch.full((7, 2), -1e9)], dim=1).requires_grad_()
    log_prob, entropy = vocabulary_parallel_log_prob(logits, targets, temperature=0.1)
    (log_prob + entropy).sum().backward()
    assert log_prob.isfinite().all()
    assert entropy.isfinite().all()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, -2:] == 0).all()


def test_no_tokens():
    logits = torch.zeros(0, 5, requires_grad=True)
    log_prob, _ = vocabulary_parallel_log_prob(logits, torch.zeros(0, dtype=torch.long))
    log_prob.sum().backward()
    assert logits.grad.shape == (0, 5)
