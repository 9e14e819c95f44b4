"""The inner loops of ``tiled`` in C++, for processors with bfloat16 in AVX-512: optional, built with the package.

``products.cpp``: products of bfloat16 matrices with float32 sums; ``softmax.cpp``: the passes over a tile of logits.
Built where a C++ compiler and torch are at hand, used where the processor multiplies bfloat16 numbers. Everywhere else,
``tiled`` does the same in torch, and converts bfloat16 to float32.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("kernels.so")


def why_not() -> str | None:
    """Why they are not used here; None: they are."""
    return why_not_loaded() if torch.backends.mkldnn.enabled else "oneDNN is switched off"


@cache
def why_not_loaded() -> str | None:
    """Why they cannot be used in this process; None: they can."""
    if not torch.cpu._is_avx512_bf16_supported():  # processors with AMX have it too
        return "the processor has no bfloat16 numbers in AVX-512"
    if not LIBRARY.is_file():
        return "perl_megatron was installed without them (that takes torch and a C++ compiler)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} was built for another torch: {error}"
    try:
        ones, result, row = torch.ones(2, 2), torch.empty(2, 2, dtype=torch.bfloat16), torch.ones(2)
        multiply(result, ones.bfloat16(), ones.bfloat16(), add=False)
        gradient_tile(ones, row.long(), row, row, None, row, result, torch.empty_like(result))
    except RuntimeError as error:  # ONEDNN_MAX_CPU_ISA may be set below the processor; the library may be an older one
        return str(error).splitlines()[0]
    return None


def serves(tensor: Tensor) -> bool:
    """Whether they take logits like ``tensor``."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and why_not() is None


def multiply(out: Tensor, first: Tensor, second: Tensor, *, add: bool) -> None:
    """``out`` [M, N] = first [M, K] · second [K, N], both bfloat16, summed in float32.

    ``out`` is float32, and with ``add`` the product is added to it; or it is bfloat16, and each result is rounded once.
    """
    first = _by_rows(first)
    second = second if second.stride(0) == 1 else _by_rows(second)
    if out.stride(1) == 1:
        torch.ops.perl_megatron.multiply_(out, first, second, add)
        return
    result = _by_rows(out)
    torch.ops.perl_megatron.multiply_(result, first, second, add)
    out.copy_(result)


def _by_rows(matrix: Tensor) -> Tensor:
    """With contiguous rows. (torch calls a transposed [K, 1] contiguous, whose stride along rows is K.)"""
    return matrix if matrix.stride(1) == 1 else torch.empty(matrix.shape, dtype=matrix.dtype).copy_(matrix)


def add_tile(
    z: Tensor, column: Tensor, maximum: Tensor, total: Tensor, weighted: Tensor, target: Tensor, *, entropy: bool
) -> None:
    """Add logits float32 [T, rows] to ``sums.Sums``, all [T]. ``column`` int64 [T]: the target's, if it is here."""
    torch.ops.perl_megatron.add_tile_(z, column, maximum, total, weighted, target, entropy)


def gradient_tile(
    z: Tensor,
    column: Tensor,
    maximum: Tensor,
    constant: Tensor,
    by_entropy: Tensor | None,
    by_log_prob: Tensor,
    out: Tensor,
    transposed: Tensor | None = None,
) -> None:
    """``out`` [T, rows], bfloat16 or float32 (then it may be ``z``): the gradient by ``fused.Coefficients``.

    ``transposed`` [rows, T], with contiguous rows: gets the same, where ``out`` is bfloat16.
    """
    torch.ops.perl_megatron.gradient_tile_(z, column, maximum, constant, by_entropy, by_log_prob, out, transposed)
