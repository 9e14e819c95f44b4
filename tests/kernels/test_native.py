"""The C++ kernels, where they were built: products of every shape, and what passes over a tile make of odd numbers."""

import math
import os
import subprocess
import sys

import pytest
import torch
from loss_case import make_case, ours

from perl_megatron.kernels import native

WHY_NOT = native.why_not()
needs_them = pytest.mark.skipif(WHY_NOT is not None, reason=f"no native loss kernels here: {WHY_NOT}")


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


@needs_them
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (3, 2, 5), (65, 7, 129), (130, 64, 64), (70, 2051, 33), (2, 4099, 66)]
)
def test_products_have_float32_sums(m, k, n, add, columns_first):
    first = normal(m, k + 3).bfloat16()[:, :k]
    second = normal(n, k + 1).bfloat16()[:, :k].t() if columns_first else normal(k, n + 1).bfloat16()[:, :n]
    before = normal(m, n)
    out = torch.full((m, n + 2), torch.nan)[:, :n]
    if add:
        out.copy_(before)
    native.multiply(out, first, second, add=add)
    exact = first.double() @ second.double() + (before.double() if add else 0)
    term_by_term = before.clone() if add else torch.zeros(m, n)
    for term in range(k):
        term_by_term += first[:, term, None].float() * second[term].float()
    last_place = torch.finfo(torch.float32).eps * exact.norm()
    assert (out - exact).norm() <= (term_by_term - exact).norm() + last_place


@needs_them
@pytest.mark.parametrize("stride", [40, 5000])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (65, 7, 40), (300, 2051, 33)])
def test_a_product_of_bfloat16_is_the_float32_one_rounded_once(m, k, n, stride):
    first, second = normal(m, k).bfloat16(), normal(k, n).bfloat16()
    sums, rounded = torch.empty(m, n), torch.full((m, stride), 7, dtype=torch.bfloat16)
    native.multiply(sums, first, second, add=False)
    native.multiply(rounded[:, :n], first, second, add=False)
    assert torch.equal(rounded[:, :n], sums.bfloat16())
    assert (rounded[:, n:] == 7).all()
    with pytest.raises(RuntimeError, match="not added to"):
        native.multiply(rounded[:, :n], first, second, add=True)


@needs_them
def test_a_transposed_first_operand_is_copied():
    first, second, out = normal(6, 4).bfloat16().t(), normal(6, 3).bfloat16(), torch.empty(4, 3)
    native.multiply(out, first, second, add=False)
    torch.testing.assert_close(out, first.float() @ second.float())


@needs_them
def test_operands_that_make_no_product_are_refused():
    with pytest.raises(RuntimeError, match="do not make a product"):
        native.multiply(torch.empty(2, 2), normal(2, 4).bfloat16(), normal(3, 2).bfloat16(), add=False)
    with pytest.raises(RuntimeError, match="bfloat16 operands"):
        native.multiply(torch.empty(2, 2), normal(2, 4), normal(4, 2), add=False)


def sums(tokens):
    lowest = torch.finfo(torch.float32).min / 2
    return torch.full((tokens,), lowest), torch.zeros(tokens), torch.zeros(tokens), torch.zeros(tokens)


@needs_them
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
def test_a_tile_is_added_to_the_sums_as_in_float64(columns):
    z = 5 * normal(9, columns)
    z[:, 0] -= 200
    column = torch.arange(9) - 1
    found = sums(9)
    for part in z.split([columns // 2, columns - columns // 2], dim=1):
        here = column - (0 if part.data_ptr() == z.data_ptr() else columns // 2)
        native.add_tile(part, here, *found, entropy=True)
    maximum, total, weighted, target = found
    shifted = z.double() - z.amax(1, keepdim=True)
    assert torch.equal(maximum, z.amax(1))
    torch.testing.assert_close(total.double(), shifted.exp().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(weighted.double(), (shifted.exp() * shifted).sum(1), rtol=1e-6, atol=1e-6)
    expected = [z[row, row - 1].item() if 0 <= row - 1 < columns else 0.0 for row in range(9)]
    assert target.tolist() == expected


@needs_them
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_odd_logits_make_of_their_row_what_the_definition_says(odd):
    z = normal(3, 40)
    z[1, 33] = odd
    _, total, weighted, _ = found = sums(3)
    native.add_tile(z, torch.full((3,), -1), *found, entropy=True)
    assert weighted.isnan().tolist() == [False, True, False]
    assert total.isnan().tolist() == [False, odd != -math.inf, False]


@needs_them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponentials_are_those_of_float32(dtype):
    """The gradient with the constant -1 is exp(z). What float32 or, normalised, bfloat16 cannot hold is 0."""
    z = -torch.linspace(0, 110, 5000)[None].repeat(2, 1)
    out = torch.empty(2, 5000, dtype=dtype)
    nothing, one = torch.zeros(2), torch.ones(2)
    native.gradient_tile(z, torch.full((2,), -1), nothing, -one, None, nothing, out)
    exact = z.double().exp()
    smallest = 2.0**-149 if dtype == torch.float32 else 2.0**-126
    assert ((out.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact + smallest).all()
    assert (out[:, z[0] < -104] == 0).all()


@needs_them
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (31, 16), (32, 16), (32, 15), (70, 100)])
def test_the_gradient_is_also_given_transposed(tokens, columns):
    z, out = normal(tokens, columns), torch.empty(tokens, columns + 3, dtype=torch.bfloat16)[:, :columns]
    transposed = torch.full((columns, tokens + 5), torch.nan, dtype=torch.bfloat16)
    one = torch.ones(tokens)
    arguments = z, torch.arange(tokens), one, one, 0.5 * one, one, out
    native.gradient_tile(*arguments, transposed[:, :tokens])
    assert torch.equal(transposed[:, :tokens], out.t())
    assert transposed[:, tokens:].isnan().all()
    native.gradient_tile(*arguments[:-1], z)
    assert torch.equal(out, z.bfloat16())


@needs_them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_them_torch_does_the_same(monkeypatch, dtype):
    case = make_case(tokens=20, hidden=16, vocabulary=100, dtype=dtype)
    with_them, _ = ours(case, "tiled")
    monkeypatch.setattr(native, "add_tile", None)  # would fail if it were called
    monkeypatch.setattr(native, "why_not", lambda: "left out here")
    without, _ = ours(case, "tiled")
    for name, value in vars(without).items():
        difference = (getattr(with_them, name).double() - value.double()).norm() / value.double().norm()
        assert difference <= 4 * torch.finfo(value.dtype).eps


@needs_them
def test_without_onednn_torch_does_the_work():
    case = make_case(dtype=torch.bfloat16)
    expected, _ = ours(case, "tiled")
    with torch.backends.mkldnn.flags(enabled=False):
        assert native.why_not() == "oneDNN is switched off"
        found, _ = ours(case, "tiled")
    torch.testing.assert_close(found.log_prob, expected.log_prob)
    command = "from perl_megatron.kernels import native; print(native.why_not())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert "only supported" in run.stdout


def test_a_library_that_does_not_load_is_done_without(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "kernels.so")
    assert "installed without them" in native.why_not_loaded.__wrapped__()
    native.LIBRARY.write_bytes(b"no library")
    assert "built for another torch" in native.why_not_loaded.__wrapped__()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "the processor" in native.why_not_loaded.__wrapped__()
