"""The loss kernels over shards of the vocabulary, also uneven and empty ones, equal one process with all of it."""

from pathlib import Path

import pytest
import torch
from launch_ranks import launch_ranks
from loss_worker import OPTIONS, PADDING, RUNS, SPLITS, case, other_policy

from perl_megatron.kernels import native
from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.divergence import exact_kl
from perl_megatron.kernels.scores import BANNED_BIAS, IGNORED, ScoreOptions

WORKER = Path(__file__).with_name("loss_worker.py")
SHARDS = [(size, name) for size, splits in SPLITS.items() for name in splits]
CASES = [(size, name, backend, dtype) for size, name in SHARDS for backend, dtype in RUNS]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{world size: what each rank found}."""
    results = {}
    for size in SPLITS:
        out = tmp_path_factory.mktemp(f"ranks-{size}")
        launch_ranks(WORKER, out, log=out / "log", processes=size)
        results[size] = [torch.load(out / f"{rank}.pt") for rank in range(size)]
    return results


def whole(dtype):
    """One process, plain definition."""
    data = case(dtype)
    hidden, weight = data.hidden.requires_grad_(), data.weight.requires_grad_()
    scores = score_tokens(hidden, weight, data.targets, options=ScoreOptions(**OPTIONS), backend="reference")
    ((data.by_log_prob * scores.log_prob).sum() + (data.by_entropy * scores.entropy).sum()).backward()
    values = {name: value.detach() for name, value in vars(scores).items()}
    return values | {"hidden_gradient": hidden.grad, "weight_gradient": weight.grad}


@pytest.fixture(scope="module")
def exact():
    return whole(torch.float64)


@pytest.fixture(scope="module")
def allowed(exact):
    """{name: twice what float32 loses in one process}, in the Frobenius norm."""
    single = whole(torch.float32)
    return {name: 2 * (single[name].double() - exact[name].double()).norm() for name in exact}


@pytest.fixture(scope="module")
def operands_rounded():
    """What both gradients lose where that of the logits is rounded to bfloat16, as the C++ loops do: exactly."""
    data = case(torch.float64)
    bias = torch.zeros(len(data.weight), dtype=torch.float64)
    bias[list(OPTIONS["banned_token_ids"])] = BANNED_BIAS
    logits = (data.hidden @ data.weight.t()).requires_grad_()
    log_p = ((logits + bias) / OPTIONS["temperature"]).log_softmax(1)
    counts = data.targets != IGNORED
    log_prob = log_p.gather(1, data.targets.clamp(min=0)[:, None])[:, 0]
    values = data.by_log_prob * log_prob - data.by_entropy * (log_p.exp() * log_p).sum(1)
    (gradient,) = torch.autograd.grad(values[counts].sum(), logits)
    error = gradient.bfloat16().double() - gradient
    return {"hidden_gradient": (error @ data.weight).norm(), "weight_gradient": (error.t() @ data.hidden).norm()}


@pytest.mark.parametrize(("size", "name", "backend", "dtype"), CASES)
def test_all_ranks_find_what_one_process_does(found, exact, allowed, operands_rounded, size, name, backend, dtype):
    split, key = SPLITS[size][name], f"{name}, {backend}, {dtype}"
    allowed = dict(allowed)
    if dtype == "bfloat16":  # inputs are the same numbers; the hidden states' gradient is rounded once, at the end
        gradient = exact["hidden_gradient"]
        allowed["hidden_gradient"] += 1.01 * (gradient.bfloat16() - gradient).norm()
        if native.why_not() is None:
            for gradient_of, lost in operands_rounded.items():
                allowed[gradient_of] += 1.02 * lost
    for rank, ranks in enumerate(found[size]):
        results = dict(ranks[key])
        first, rows = sum(split[:rank]), split[rank]
        gradient = results.pop("weight_gradient")
        assert gradient.dtype == torch.float32
        assert len(gradient) == rows + PADDING
        assert not gradient[rows:].any()
        right = exact["weight_gradient"][first : first + rows]
        assert (gradient[:rows].double() - right).norm() <= allowed["weight_gradient"]
        for value in ("log_prob", "entropy", "log_sum_exp", "top_log_probs", "hidden_gradient"):
            assert results[value].isfinite().all()
            assert (results[value].double() - exact[value]).norm() <= allowed[value], value
            assert torch.equal(results[value], found[size][0][key][value]), f"ranks differ in {value}"
        assert torch.equal(results["is_top"], exact["is_top"])
        assert torch.equal(results["top_ids"], exact["top_ids"])


@pytest.mark.parametrize(("size", "name"), SHARDS)
def test_the_tiles_need_two_collectives_forward_and_one_backward(found, size, name):
    for ranks in found[size]:
        forward, backward = ranks[f"{name}, tiled, float32"]["collectives"]
        assert forward == ["all_reduce", "all_reduce", "all_gather", "all_gather"]  # the last two for top_k
        assert backward == ["all_reduce"]


@pytest.mark.parametrize(("size", "name"), SHARDS)
def test_the_exact_divergence_is_that_of_one_process(found, size, name):
    def divergence(dtype):
        policies = [(each.hidden, each.weight) for each in (case(dtype), other_policy(dtype))]
        return exact_kl(*policies, case(dtype).targets, options=ScoreOptions(**OPTIONS))

    exact = divergence(torch.float64)
    limit = 2 * (divergence(torch.float32).double() - exact).norm()
    for ranks in found[size]:
        assert (ranks[f"{name}, divergence"].double() - exact).norm() <= limit


@pytest.mark.parametrize(("size", "name"), SHARDS)
def test_no_target_is_on_top_where_another_ranks_logit_is_not_a_number(found, size, name):
    counts = case(torch.float32).targets != IGNORED
    assert counts.any()
    for ranks in found[size]:
        assert not ranks[f"{name}, poisoned"].any()
