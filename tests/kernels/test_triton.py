"""What only the Triton kernels have: buffers that end in NaN, ways to cut blocks, 16-bit results. In the interpreter.

`make check-kernels` runs this file, and test_backends.py, with `TRITON_INTERPRET=1`.
"""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import triton
from loss_case import make_case, ours, plain

from perl_megatron.kernels import triton_fused, triton_kernels, triton_settings
from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.scores import ScoreOptions, VocabularyShard
from perl_megatron.kernels.tiles import TileShape

LAUNCH = triton_settings.Launch(16, 32, 16, warps=1, stages=1)


def use(monkeypatch, launch, rows_of_split=64, tile=None):
    monkeypatch.setattr(triton_settings, "INTERPRETER", triton_settings.Settings(launch, launch))
    monkeypatch.setattr(triton_settings, "ROWS_OF_SPLIT", rows_of_split)
    if tile:
        monkeypatch.setattr(triton_settings, "TILE", TileShape(*tile))


def in_nan(matrix, rows, columns):
    """The same matrix as the upper left part of a larger one, which is NaN elsewhere."""
    larger = torch.full((len(matrix) + rows, matrix.shape[1] + columns), torch.nan, dtype=matrix.dtype)
    larger[: len(matrix), : matrix.shape[1]] = matrix
    return larger[: len(matrix), : matrix.shape[1]]


@pytest.mark.parametrize(("descriptors", "halves"), itertools.product((False, True), repeat=2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_behind_the_buffers_is_read_however_blocks_are_cut(monkeypatch, dtype, descriptors, halves):
    """T, H and V are divided by no block. (Rows of 24 numbers are at multiples of 16 bytes: nothing is copied.)"""
    use(monkeypatch, dataclasses.replace(LAUNCH, descriptors=descriptors, halves=halves), tile=(32, 128))
    case = make_case(tokens=37, hidden=23, vocabulary=203, dtype=torch.float64)
    exact, single = plain(case), plain(case.to(torch.float32)).errors(plain(case))
    case = case.to(dtype)
    case = dataclasses.replace(case, hidden=in_nan(case.hidden, 3, 1), weight=in_nan(case.weight, 5, 1))
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    scores = score_tokens(hidden, weight, case.targets, backend="triton")
    errors = {
        name: (getattr(scores, name).double() - getattr(exact, name)).abs().max().item()
        for name in ("log_prob", "entropy")
    }
    assert errors["log_prob"] <= 2 * single["log_prob"]
    assert errors["entropy"] <= 2 * single["entropy"]
    ((case.by_log_prob * scores.log_prob).sum() + (case.by_entropy * scores.entropy).sum()).backward()
    for found, right, allowed in (
        (hidden.grad, exact.hidden_gradient, single["hidden_gradient"]),
        (weight.grad, exact.weight_gradient, single["weight_gradient"]),
    ):
        rounding = (right.to(dtype).double() - right).norm() / right.norm()
        assert (found.double() - right).norm() / right.norm() <= 2 * allowed + 1.01 * rounding


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_tile_is_rounded_once_to_sixteen_bits(monkeypatch, descriptors, gradient):
    """As on a GPU, where the tile is an operand of the next two products; on a CPU it is float32.

    To the last place, as the interpreter cuts off what a GPU rounds.
    """
    use(monkeypatch, dataclasses.replace(LAUNCH, descriptors=descriptors))
    case = make_case(tokens=21, hidden=24, vocabulary=75, dtype=torch.bfloat16)
    tiles = triton_fused._TritonPasses().make_tiles(
        case.hidden, case.weight, case.targets, VocabularyShard.whole(case.weight), ScoreOptions(temperature=0.5)
    )
    z = 2 * case.hidden.double() @ case.weight.double().t()
    maximum = z.amax(1)
    constant, by_entropy = case.by_log_prob, case.by_entropy
    expected = z
    coefficients = None
    if gradient:
        coefficients = triton_fused.Coefficients(maximum.float(), case.by_log_prob, constant, by_entropy)
        shifted = z - maximum[:, None]
        expected = -shifted.exp() * (constant[:, None] + by_entropy[:, None] * shifted)
        expected[range(21), case.targets] += case.by_log_prob
    found = triton_fused._TritonPasses()._tile(
        tiles, coefficients, slice(0, 21), case.hidden, slice(0, 75), case.weight
    )
    assert found.dtype == (torch.bfloat16 if gradient else torch.float32)
    noise = 64 * torch.finfo(torch.float32).eps * (1 + z.abs().amax(1, keepdim=True)) * (1 + expected.abs())
    last_place = torch.finfo(found.dtype).eps * expected.abs()
    assert ((found.double() - expected).abs() <= noise + last_place).all()


def test_a_tokens_scores_are_the_same_bits_whatever_else_is_in_the_batch(monkeypatch):
    """Inputs are eighths, whose products float32 sums up exactly in any order.

    The interpreter multiplies blocks by NumPy, whose matrix product may sum up a row in another order at another place
    (OpenBLAS does on processors with AVX2 only). A GPU does not: tests/kernels/test_triton_gpu.py.
    """
    use(monkeypatch, LAUNCH)
    case = make_case(tokens=75, hidden=40, vocabulary=333, dtype=torch.bfloat16)
    case = dataclasses.replace(case, hidden=(8 * case.hidden).round() / 8, weight=(8 * case.weight).round() / 8)

    def score(tokens):
        options = ScoreOptions(temperature=0.9, top_k=3)
        return score_tokens(case.hidden[tokens], case.weight, case.targets[tokens], options=options, backend="triton")

    whole = score(slice(None))
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 31, 64):
        tokens = torch.randperm(75, generator=generator)[:size]
        for name, found in vars(score(tokens)).items():
            assert torch.equal(found, getattr(whole, name)[tokens]), f"{name} of {size} tokens"


def test_a_repeated_pass_gives_the_same_bits(monkeypatch):
    use(monkeypatch, LAUNCH)
    case = make_case(tokens=50, hidden=40, vocabulary=200, dtype=torch.float32)
    first, second = (ours(case, "triton")[0] for _ in range(2))
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(second, name)), name


def test_splits_are_combined_whatever_their_number(monkeypatch):
    """One split, and as many as blocks."""
    case = make_case(tokens=20, hidden=16, vocabulary=161)
    exact, _ = ours(case, "tiled")
    for rows in (32, 64, 192):
        use(monkeypatch, LAUNCH, rows_of_split=rows)
        found, _ = ours(case, "triton")
        for name, value in vars(found).items():
            torch.testing.assert_close(value, getattr(exact, name), rtol=1e-12, atol=1e-13)


def test_kernels_have_neither_atomics_nor_settings_that_depend_on_the_batch():
    source = Path(triton_kernels.__file__).read_text()
    assert "atomic" not in source.replace("No atomics", "")
    for settings in (*triton_settings.HALF.values(), *triton_settings.SINGLE.values()):
        assert triton_settings.ROWS_OF_SPLIT % settings.forward.rows == 0
    assert triton.knobs.runtime.interpret
