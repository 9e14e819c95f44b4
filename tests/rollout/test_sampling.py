import pytest
import torch

from perl_megatron.rollout.sampling import draw, log_distribution


@pytest.fixture
def logits():
    return torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3


def test_distribution_is_the_bias_then_the_temperature(logits):
    biased = logits.double()
    biased[:, [3, 7]] -= 100
    expected = (biased / 0.5).log_softmax(dim=-1)
    actual = log_distribution(logits, temperature=0.5, top_p=1.0, banned_token_ids=(3, 7))
    torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-6)  # log-probabilities down to -200
    assert logits[0, 3] > -50  # the caller's tensor is untouched


def test_top_p_keeps_the_smallest_set_with_that_mass():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    kept = log_distribution(logits, temperature=1.0, top_p=0.75, banned_token_ids=()).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.0, 0.375, 0.0]]))
    only_one = log_distribution(logits, temperature=1.0, top_p=1e-6, banned_token_ids=()).exp()
    torch.testing.assert_close(only_one, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_greedy_is_scored_at_temperature_one(logits):
    scored = log_distribution(logits, temperature=0.0, top_p=0.5, banned_token_ids=())
    torch.testing.assert_close(scored, logits.log_softmax(dim=-1))
    assert torch.equal(draw(scored, None), logits.argmax(dim=-1))


def test_draws_follow_the_distribution():
    log_probs = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(10_000, 4)
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(draw(log_probs, uniforms), minlength=4)
    assert (counts - torch.tensor([5000, 0, 3000, 2000])).abs().max() <= 1


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_range_draw_possible_tokens(uniform):
    log_probs = torch.tensor([[0.0, 0.3, 0.7, 0.0]]).log()
    assert draw(log_probs, torch.tensor([uniform], dtype=torch.float64)).item() == (1 if uniform == 0 else 2)
