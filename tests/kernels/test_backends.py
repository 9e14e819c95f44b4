"""Every backend computes what its definition says, on every input; as exactly as float32 allows."""

import math

import pytest
import torch
from loss_case import make_case, ours, plain

from perl_megatron.kernels import dispatch, native, tiles, triton_settings
from perl_megatron.kernels.dispatch import BACKENDS, score_tokens
from perl_megatron.kernels.scores import IGNORED, ScoreOptions, VocabularyShard

CPU = torch.device("cpu")
IN_TORCH = "tiled in torch"
VARIANTS = [backend for backend in BACKENDS if dispatch.why_not(backend, CPU) is None]
"""`make check-kernels` runs this file once more in Triton's interpreter."""
VARIANTS += [IN_TORCH] if native.why_not() is None else []
LARGE = {"tokens": 300, "hidden": 64, "vocabulary": 5003}
"""Ragged in both directions at the true sizes of tiles."""


@pytest.fixture(params=VARIANTS)
def backend(request, monkeypatch):
    if request.param == IN_TORCH:
        monkeypatch.setattr(native, "why_not", lambda: "left out here")
        return "tiled"
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "FEW_TOKENS", 4)
    monkeypatch.setattr(tiles, "ROWS", 8)
    launch = triton_settings.Launch(4, 8, 4, warps=1, stages=1)
    monkeypatch.setattr(triton_settings, "INTERPRETER", triton_settings.Settings(launch, launch))
    monkeypatch.setattr(triton_settings, "ROWS_OF_SPLIT", 16)


def definition(case, temperature=1.0, banned=()):
    """By hand, in float64: z, one token after the other."""
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(case.targets))
    bias = torch.zeros(len(case.weight), dtype=torch.float64)
    bias[list(banned)] = -100
    return torch.stack([(case.weight @ row + bias) / each for row, each in zip(case.hidden, temperatures, strict=True)])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per token"])
@pytest.mark.parametrize("banned", [(), (0, 5, 22)])
def test_values_are_those_of_the_definition(backend, temperature, banned):
    case = make_case()
    if temperature == "per token":
        temperature = torch.linspace(0.3, 3, 7)
    z = definition(case, temperature, banned)
    p = z.softmax(1)
    options = ScoreOptions(temperature=temperature, banned_token_ids=banned, top_k=5)
    scores = score_tokens(case.hidden, case.weight, case.targets, options=options, backend=backend)
    exact = {"rtol": 1e-6 if torch.is_tensor(temperature) else 1e-13, "atol": 1e-13}  # its temperatures are float32
    log_total = z.exp().sum(1).log()
    torch.testing.assert_close(scores.log_sum_exp, log_total, **exact)
    torch.testing.assert_close(scores.log_prob, z[range(7), case.targets] - log_total, **exact)
    torch.testing.assert_close(scores.entropy, -(p * p.log()).nan_to_num().sum(1), **exact)
    assert scores.is_top.tolist() == (z.argmax(1) == case.targets).tolist()
    best = p.log().sort(dim=1, descending=True)
    torch.testing.assert_close(scores.top_log_probs, best.values[:, :5], **exact)
    assert scores.top_ids.tolist() == best.indices[:, :5].tolist()


@pytest.mark.usefixtures("small_tiles")
def test_top_agreement_counts_a_tie(backend):
    hidden, weight = torch.ones(2, 1), torch.tensor([[1.0], [2.0], [2.0]])
    scores = score_tokens(hidden, weight, torch.tensor([2, 0]), backend=backend)
    assert scores.is_top.tolist() == [True, False]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [0.8, "per token"])
def test_gradients_of_both_results(backend, temperature):
    case = make_case(tokens=5, hidden=3, vocabulary=11)
    if temperature == "per token":
        temperature = torch.linspace(0.3, 3, 5, dtype=torch.float64)
    options = ScoreOptions(temperature=temperature, banned_token_ids=(2,))

    def function(hidden, weight):
        scores = score_tokens(hidden, weight, case.targets, options=options, backend=backend)
        return scores.log_prob, scores.entropy

    assert torch.autograd.gradcheck(function, (case.hidden.requires_grad_(), case.weight.requires_grad_()))


@pytest.mark.parametrize("offset", [0, 100])
def test_float32_loses_at_most_twice_what_plain_torch_loses(backend, offset):
    """Also where all logits have a common size, which softmax takes away."""
    case = make_case(**LARGE)
    if offset:
        case.hidden[:, 0], case.weight[:, 0] = 1, offset
    exact, single = plain(case), case.to(torch.float32)
    allowed = plain(single).errors(exact)
    found, scores = ours(single, backend)
    assert scores.log_prob.dtype == scores.entropy.dtype == found.weight_gradient.dtype == torch.float32
    for name, error in found.errors(exact).items():
        assert error <= 2 * allowed[name], name


def rounding_of_operands(case):
    """Relative errors of both gradients where that of the logits is rounded to bfloat16, and nothing else: exactly.

    The native kernels multiply it so, as a GPU does and as autograd does.
    """
    log_p = (case.hidden @ case.weight.t()).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
    gradient = -log_p.exp() * (case.by_log_prob[:, None] + case.by_entropy[:, None] * (log_p + entropy))
    gradient[range(len(gradient)), case.targets] += case.by_log_prob
    error = gradient.bfloat16().double() - gradient
    return {
        "hidden_gradient": ((error @ case.weight).norm() / (gradient @ case.weight).norm()).item(),
        "weight_gradient": ((error.t() @ case.hidden).norm() / (gradient.t() @ case.hidden).norm()).item(),
    }


def rounds_operands(backend):
    return backend == "tiled" and native.why_not() is None


def test_bfloat16_inputs_are_scored_better_than_by_plain_torch(backend):
    """Values as float32 would; gradients as float32 would, and rounded once (and once before, where operands are)."""
    case = make_case(**LARGE)
    exact, low = plain(case), case.to(torch.bfloat16)
    gradients = {"hidden_gradient": exact.hidden_gradient, "weight_gradient": exact.weight_gradient}
    rounding = {name: ((each.bfloat16() - each).norm() / each.norm()).item() for name, each in gradients.items()}
    if rounds_operands(backend):
        rounding = {name: math.hypot(error, rounding[name]) for name, error in rounding_of_operands(case).items()}
    single, theirs = plain(case.to(torch.float32)).errors(exact), plain(low).errors(exact)
    found, scores = ours(low, backend)
    assert scores.log_prob.dtype == torch.float32
    assert found.weight_gradient.dtype == found.hidden_gradient.dtype == torch.bfloat16
    errors = found.errors(exact)
    for name in ("log_prob", "entropy"):
        assert errors[name] <= 2 * single[name] < theirs[name]
    for name in ("hidden_gradient", "weight_gradient"):
        assert errors[name] <= 1.02 * rounding[name] < theirs[name]
        assert rounds_operands(backend) or rounding[name] < theirs[name] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_buffer_gets_the_sum_in_float32(backend, dtype):
    case = make_case(**LARGE)
    exact = plain(case).weight_gradient
    buffer = torch.ones(exact.shape)
    found, _ = ours(case.to(dtype), backend, ScoreOptions(gradient_buffer=buffer))
    assert not found.weight_gradient.any(), "autograd got a gradient, too"
    allowed = plain(case.to(torch.float32)).errors(plain(case))["weight_gradient"]
    if dtype == torch.bfloat16 and rounds_operands(backend):
        allowed += rounding_of_operands(case)["weight_gradient"]
    last_place = torch.finfo(torch.float32).eps * math.sqrt(exact.numel()) / exact.norm()  # of 1 + the gradient
    assert (buffer.double() - 1 - exact).norm() / exact.norm() <= 2 * allowed + last_place


@pytest.mark.usefixtures("small_tiles")
def test_entropy_left_out_is_zero_and_changes_nothing_else(backend):
    case = make_case(dtype=torch.float32)
    whole, scores = ours(case, backend)
    only, fewer = ours(case, backend, ScoreOptions(entropy=False))
    assert torch.equal(scores.log_prob, fewer.log_prob)
    assert not fewer.entropy.any()
    expected, _ = ours(type(case)(**{**vars(case), "by_entropy": torch.zeros(7)}), backend)
    torch.testing.assert_close(only.hidden_gradient, expected.hidden_gradient)
    assert not torch.equal(whole.hidden_gradient, only.hidden_gradient)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [math.nan, 0.0])
def test_ignored_tokens_are_zero_and_have_no_gradient_whatever_they_hold(backend, poison, temperature):
    case = make_case(tokens=9)
    ignored = torch.tensor([0, 5, 8])
    kept = torch.tensor([1, 2, 3, 4, 6, 7])
    case.targets[ignored] = IGNORED
    case.hidden[ignored] = poison
    temperatures = torch.ones(9)
    temperatures[ignored] = temperature
    found, scores = ours(case, backend, ScoreOptions(top_k=2, temperature=temperatures))
    for value in (scores.log_prob, scores.entropy, scores.log_sum_exp, scores.is_top, scores.top_log_probs):
        assert not value[ignored].any()
    assert not found.hidden_gradient[ignored].any()
    fields = ("hidden", "targets", "by_log_prob", "by_entropy")
    part = {name: getattr(case, name)[kept] for name in fields}
    alone, _ = ours(type(case)(weight=case.weight, **part), backend)
    torch.testing.assert_close(found.log_prob[kept], alone.log_prob, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.weight_gradient, alone.weight_gradient, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.hidden_gradient[kept], alone.hidden_gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("small_tiles")
def test_all_tokens_ignored(backend):
    case = make_case(tokens=5)
    case.targets.fill_(IGNORED)
    found, _ = ours(case, backend)
    assert not found.log_prob.any()
    assert not found.weight_gradient.any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("target", [23, 1000, -1])
def test_a_target_outside_the_vocabulary_has_no_probability(backend, target):
    case = make_case()
    expected, _ = ours(case, backend)
    case.targets[3] = target
    scores = score_tokens(case.hidden, case.weight, case.targets, backend=backend)
    assert scores.log_prob.isnan().tolist() == [index == 3 for index in range(7)]
    others = [index for index in range(7) if index != 3]
    assert torch.equal(scores.log_prob[others], expected.log_prob[others])
    assert torch.equal(scores.entropy, expected.entropy)
    assert not scores.is_top[3]
    hidden = case.hidden.clone().requires_grad_()
    score_tokens(hidden, case.weight, case.targets, backend=backend).log_prob.nansum().backward()
    assert not hidden.grad[3].any()
    assert hidden.grad[others].any(dim=1).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_hidden_state_that_is_not_finite_spoils_its_token_only(backend, poison):
    case = make_case(dtype=torch.float32)
    expected, _ = ours(case, backend)
    case.hidden[2, 1] = poison
    scores = score_tokens(case.hidden, case.weight, case.targets, backend=backend)
    others = [index for index in range(7) if index != 2]
    for found, right in ((scores.log_prob, expected.log_prob), (scores.entropy, expected.entropy)):
        assert found[2].isnan()
        assert torch.equal(found[others], right[others])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_0_spoils_its_token_only(backend, wrong):
    case = make_case()
    temperatures = torch.ones(7)
    expected = score_tokens(case.hidden, case.weight, case.targets, backend=backend)
    temperatures[4] = wrong
    options = ScoreOptions(temperature=temperatures)
    scores = score_tokens(case.hidden, case.weight, case.targets, options=options, backend=backend)
    others = [0, 1, 2, 3, 5, 6]
    assert scores.log_prob[4].isnan()
    assert scores.entropy[4].isnan()
    assert not scores.is_top[4]
    torch.testing.assert_close(scores.log_prob[others], expected.log_prob[others], rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_spoil_what_their_logits_make_of_it(backend, poison):
    case = make_case(dtype=torch.float32)
    case.weight[20] = 0
    case.weight[20, 0] = poison
    z = case.hidden @ case.weight.t()
    spoilt = z.isnan().any(1) | (z == math.inf).any(1)
    scores = score_tokens(case.hidden, case.weight, case.targets, backend=backend)
    assert (scores.log_prob.isnan() == spoilt).all()
    assert scores.entropy.isnan().all()
    assert not scores.is_top[spoilt].any()


@pytest.mark.usefixtures("small_tiles")
def test_rows_behind_the_vocabulary_are_never_read(backend):
    case = make_case()
    expected, _ = ours(case, backend)
    padded = type(case)(**{**vars(case), "weight": torch.cat([case.weight, torch.full((10, 6), math.nan).double()])})
    found, _ = ours(padded, backend, shard=VocabularyShard(first=0, size=23, total=23))
    assert torch.equal(found.log_prob, expected.log_prob)
    torch.testing.assert_close(found.hidden_gradient, expected.hidden_gradient, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.weight_gradient[:23], expected.weight_gradient, rtol=1e-13, atol=1e-13)
    assert not found.weight_gradient[23:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(backend, tokens, dtype):
    case = make_case(tokens=tokens, dtype=dtype)
    found, scores = ours(case, backend, ScoreOptions(top_k=3))
    assert scores.log_prob.shape == scores.entropy.shape == scores.is_top.shape == (tokens,)
    assert scores.top_ids.shape == (tokens, 3)
    assert found.hidden_gradient.shape == case.hidden.shape
    assert found.weight_gradient.any() == bool(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_tiles")
def test_inputs_may_lie_in_memory_as_they_like(backend, dtype):
    """Transposed, every other column, a gradient buffer by columns; a last tile of one token."""
    case = make_case(tokens=9, dtype=dtype)
    expected, _ = ours(case, backend)
    wide = torch.zeros(23, 12, dtype=dtype)
    wide[:, ::2] = case.weight
    buffer = torch.zeros(6, 23).t()
    hidden, weight = case.hidden.t().contiguous().t().requires_grad_(), wide[:, ::2].requires_grad_()
    scores = score_tokens(hidden, weight, case.targets, options=ScoreOptions(gradient_buffer=buffer), backend=backend)
    ((case.by_log_prob * scores.log_prob).sum() + (case.by_entropy * scores.entropy).sum()).backward()
    close = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}
    torch.testing.assert_close(scores.log_prob, expected.log_prob)
    torch.testing.assert_close(hidden.grad, expected.hidden_gradient, **close)
    torch.testing.assert_close(buffer.to(dtype), expected.weight_gradient, **close)


def test_large_logits_stay_finite(backend):
    case = make_case(dtype=torch.float32)
    large = type(case)(**{**vars(case), "hidden": case.hidden * 1e6})
    found, _ = ours(large, backend, ScoreOptions(temperature=0.1))
    for value in vars(found).values():
        assert value.isfinite().all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(backend, frozen):
    case = make_case()
    inputs = {"hidden": case.hidden, "weight": case.weight}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    score_tokens(**inputs, targets=case.targets, backend=backend).log_prob.sum().backward()
    assert [name for name, tensor in inputs.items() if tensor.grad is None] == [frozen]
