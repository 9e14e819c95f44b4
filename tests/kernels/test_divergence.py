import math

import pytest
import torch
from loss_case import make_case

from perl_megatron.kernels import tiles
from perl_megatron.kernels.divergence import exact_kl
from perl_megatron.kernels.scores import IGNORED, ScoreOptions


def definition(first, second, temperature=1.0, banned=()):
    bias = torch.zeros(len(first.weight), dtype=first.weight.dtype)
    bias[list(banned)] = -100
    log_p, log_q = (((each.hidden @ each.weight.t() + bias) / temperature).log_softmax(1) for each in (first, second))
    return (log_p.exp() * (log_p - log_q)).sum(1)


def pairs(*cases):
    return [(case.hidden, case.weight) for case in cases]


@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.7, (0, 5, 22))])
def test_is_the_sum_over_the_vocabulary(monkeypatch, temperature, banned):
    monkeypatch.setattr(tiles, "FEW_TOKENS", 4)
    monkeypatch.setattr(tiles, "ROWS", 8)
    first, second = make_case(hidden=6), make_case(hidden=9)  # other weights, another hidden size
    options = ScoreOptions(temperature=temperature, banned_token_ids=banned)
    found = exact_kl(*pairs(first, second), first.targets, options=options)
    torch.testing.assert_close(found, definition(first, second, temperature, banned), rtol=1e-12, atol=1e-12)
    assert found.min() > 0.1


def test_is_zero_between_equals():
    case = make_case(tokens=300, hidden=64, vocabulary=5003, dtype=torch.float32)
    assert exact_kl(*pairs(case, case), case.targets).abs().max() == 0


def test_close_policies_are_told_apart_to_a_millionth():
    first = make_case(tokens=300, hidden=64, vocabulary=5003)
    second = type(first)(**{**vars(first), "hidden": first.hidden + 0.002 * make_case(tokens=300, hidden=64).hidden})
    exact = definition(first, second)
    found = exact_kl(*pairs(first.to(torch.float32), second.to(torch.float32)), first.targets)
    assert 1e-6 < exact.mean() < 1e-3
    assert (found - exact).abs().max() < 1e-6


def test_float32_loses_at_most_twice_what_plain_torch_loses():
    first, second = (make_case(tokens=300, hidden=size, vocabulary=5003) for size in (64, 65))
    exact = definition(first, second)
    singles = [case.to(torch.float32) for case in (first, second)]
    allowed = 2 * (definition(*singles).double() - exact).norm()
    assert (exact_kl(*pairs(*singles), first.targets).double() - exact).norm() <= allowed
    low = [case.to(torch.bfloat16) for case in (first, second)]  # the same numbers
    assert (exact_kl(*pairs(*low), first.targets).double() - exact).norm() <= allowed


def test_ignored_tokens_have_none_whatever_they_hold():
    first, second = make_case(hidden=6), make_case(hidden=9)
    expected = exact_kl(*pairs(first, second), first.targets)
    first.targets[2] = IGNORED
    first.hidden[2] = math.nan
    found = exact_kl(*pairs(first, second), first.targets)
    assert found[2] == 0
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(found[others], expected[others])


def test_policies_of_other_vocabularies_are_refused():
    first, second = make_case(), make_case(vocabulary=22)
    with pytest.raises(ValueError, match="cannot hold"):
        exact_kl(*pairs(first, second), first.targets)
