"""The Triton kernels on a GPU, at sizes that fill it: what the interpreter cannot show. Skipped where there is none."""

import dataclasses
import math

import pytest
import torch
from loss_case import make_case, ours, plain

from perl_megatron.kernels import dispatch
from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.scores import IGNORED, ScoreOptions, VocabularyShard

GPU = torch.device("cuda")
PROBLEM = dispatch.why_not("triton", GPU) if torch.cuda.is_available() else "there is no GPU"
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"Triton's kernels do not run here: {PROBLEM}")
SIZES = {"tokens": 1031, "hidden": 2048, "vocabulary": 20_011}
"""No block divides tokens or vocabulary."""


def on_gpu(case):
    values = {field.name: getattr(case, field.name).to(GPU) for field in dataclasses.fields(case)}
    return type(case)(**values)


@pytest.fixture(scope="module")
def exact_case():
    return on_gpu(make_case(**SIZES))


@pytest.fixture(scope="module")
def exact(exact_case):
    """Plain torch in float64."""
    return plain(exact_case)


@pytest.fixture(scope="module")
def single_errors(exact_case, exact):
    """Plain torch's in float32, without the tensor cores' shorter formats."""
    assert torch.get_float32_matmul_precision() == "highest"
    return plain(exact_case.to(torch.float32)).errors(exact)


def test_float32_loses_at_most_twice_what_plain_torch_loses_on_a_gpu(exact_case, exact, single_errors):
    found, _ = ours(exact_case.to(torch.float32), "triton")
    for name, error in found.errors(exact).items():
        assert error <= 2 * single_errors[name], name


def test_bfloat16_is_scored_as_float32_and_its_gradients_are_rounded_twice(exact_case, exact, single_errors):
    """Once as the operand of the two products, and once as the result."""
    case = exact_case.to(torch.bfloat16)
    found, scores = ours(case, "triton")
    errors, theirs = found.errors(exact), plain(case).errors(exact)
    assert scores.log_prob.dtype == torch.float32
    for name in ("log_prob", "entropy"):
        assert errors[name] <= 2 * single_errors[name] < theirs[name], name
    log_p = (exact_case.hidden @ exact_case.weight.t()).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
    gradient = -log_p.exp() * (case.by_log_prob[:, None] + case.by_entropy[:, None] * (log_p + entropy))
    gradient[range(len(gradient)), case.targets] += case.by_log_prob
    lost = gradient.bfloat16().double() - gradient
    for name, by_operand, right in (
        ("hidden_gradient", lost @ exact_case.weight, exact.hidden_gradient),
        ("weight_gradient", lost.t() @ exact_case.hidden, exact.weight_gradient),
    ):
        rounding = math.hypot(by_operand.norm() / right.norm(), (right.bfloat16() - right).norm() / right.norm())
        assert errors[name] <= 1.02 * rounding + 2 * single_errors[name], name
        assert errors[name] < theirs[name], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_scores_are_the_same_bits_in_every_batch_on_a_gpu(exact_case, dtype):
    case = exact_case.to(dtype)
    options = ScoreOptions(temperature=0.9, top_k=3)
    whole = score_tokens(case.hidden, case.weight, case.targets, options=options, backend="triton")
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 127, 128, 129, 1000):
        tokens = torch.randperm(SIZES["tokens"], generator=generator)[:size].to(GPU)
        part = score_tokens(case.hidden[tokens], case.weight, case.targets[tokens], options=options, backend="triton")
        for name, found in vars(part).items():
            assert torch.equal(found, getattr(whole, name)[tokens]), f"{name} of {size} tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_passes_give_the_same_bits_on_a_gpu(exact_case, dtype):
    """Races would not."""
    case = exact_case.to(dtype)
    first, _ = ours(case, "triton")
    for _ in range(5):
        again, _ = ours(case, "triton")
        for name, value in vars(first).items():
            assert torch.equal(value, getattr(again, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_behind_a_buffer_is_read_on_a_gpu(exact_case, dtype):
    case = exact_case.to(dtype)
    expected, _ = ours(case, "triton")
    weight = torch.cat([case.weight, torch.full_like(case.weight[:300], torch.nan)])
    hidden = torch.cat([case.hidden, torch.full_like(case.hidden[:200], torch.nan)])
    padded = dataclasses.replace(case, hidden=hidden[: SIZES["tokens"]], weight=weight)
    rows = SIZES["vocabulary"]
    found, _ = ours(padded, "triton", shard=VocabularyShard(first=0, size=rows, total=rows))
    assert torch.equal(found.log_prob, expected.log_prob)
    assert torch.equal(found.entropy, expected.entropy)
    assert not found.weight_gradient[rows:].any()
    assert found.hidden_gradient.isfinite().all()
    torch.testing.assert_close(found.weight_gradient[:rows], expected.weight_gradient)


def test_ignored_tokens_have_no_share_on_a_gpu(exact_case):
    case = exact_case.to(torch.bfloat16)
    targets, hidden = case.targets.clone(), case.hidden.clone()
    targets[::3], hidden[::3] = IGNORED, torch.nan
    found, scores = ours(dataclasses.replace(case, targets=targets, hidden=hidden), "triton")
    expected, _ = ours(case, "triton")
    kept = targets != IGNORED
    assert not scores.log_prob[~kept].any()
    assert not found.hidden_gradient[~kept].any()
    assert torch.equal(found.log_prob[kept], expected.log_prob[kept])
    assert found.weight_gradient.isfinite().all()


def test_a_pass_needs_one_tile_of_memory_on_a_gpu(exact_case):
    """Over inputs and gradients: the tile, a float32 gradient of the hidden states, and numbers of each token."""
    case = exact_case.to(torch.bfloat16)
    buffer = torch.zeros(case.weight.shape, device=GPU)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_()

    def run():
        hidden.grad = None
        options = ScoreOptions(gradient_buffer=buffer)
        scores = score_tokens(hidden, weight, case.targets, options=options, backend="triton")
        scores.log_prob.sum().backward()

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    tile, hidden_gradient = 1031 * 4096 * 2, hidden.numel() * 4
    weight_gradient = weight.numel() * 2  # autograd's, of zeros
    splits = 4 * 5 * 1031 * 4
    over = torch.cuda.max_memory_allocated() - before
    assert over <= 1.25 * (tile + hidden_gradient + weight_gradient + splits) + 2**20
