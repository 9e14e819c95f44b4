"""The inner loops of ``tiled`` in C++, for processors with AVX-512 or AMX: optional, built with the package.

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


@cache
def why_not() -> str | None:
    """Why they are not used here; None: they are."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "the processor has no bfloat16 products (AVX-512 or AMX)"
    if not LIBRARY.is_file():
        return "perl_megatron was installed without them (that takes torch and a C++ compiler)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} was built for another torch: {error}"
    return None


def serves(tensor: Tensor) -> bool:
    """Whether they take logits like ``tensor``."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and why_not() is None


def multiply(out: Tensor, first: Tensor, second: Tensor, *, add: bool) -> None:
    """``out`` float32 [M, N] = first [M, K] · second [K, N], both bfloat16; with ``add``, added to it."""
    torch.ops.perl_megatron.multiply_(out, first if first.stride(1) == 1 else first.contiguous(), second, add)


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
) -> None:
    """``out`` [T, rows], bfloat16 or float32 (then it may be ``z``): the gradient by ``fused.Coefficients``."""
    torch.ops.perl_megatron.gradient_tile_(z, column, maximum, constant, by_entropy, by_log_prob, out)
