"""Digests of weights that can be added up from parts: an engine holds them fused, and sharded over ranks.

A tensor is looked at as a matrix [rows, columns]: its first dimension, and all others as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK, _CHUNK_CUDA = 1 << 18, 1 << 24
"""Numbers looked at together: on a CPU, what is made of them stays in a core's cache."""
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio's odd 64-bit integer, as a signed one
_ROW_SALT = 0x632BE59BD9B4E019
_MODULUS = 1 << 64


def as_matrix(tensor: Tensor) -> Tensor:
    """[rows, columns]; a vector has one column, a scalar also one row."""
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)


def comparable(numbers: Tensor) -> Tensor:
    """The numbers, with one zero for both zeros and for all subnormal ones.

    A product by which an engine is asked for its numbers (``vllm_holdings``) does not tell the zeros apart, and
    processors take subnormal bfloat16 numbers for zero.
    """
    if not numbers.dtype.is_floating_point:
        return numbers
    return torch.where(numbers.abs() < torch.finfo(numbers.dtype).tiny, 0, numbers)


def checksum(matrix: Tensor, first_row: int = 0, first_column: int = 0) -> int:
    """Of a part of a matrix that begins at a row and a column of the whole; the sum of its parts' is that of the whole.

        Σ_r V_r · (Σ_c W_c · bits(x_rc))    modulo 2^64, with odd V_r, W_c of the places

    Integer arithmetic that wraps is exact and does not depend on the order of summation, and it runs where the tensor
    lies. Every change of one number changes it, after ``comparable``.
    """
    rows, columns = matrix.shape
    column_weights = _weights_of_places(first_column, columns, 0, matrix.device)
    row_weights = _weights_of_places(first_row, rows, _ROW_SALT, matrix.device)
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    step = max(1, (_CHUNK_CUDA if matrix.is_cuda else _CHUNK) // max(1, columns))
    for start in range(0, rows, step):
        part = comparable(matrix[start : start + step]).contiguous()
        bits = part.view(_INTEGERS[part.element_size()]).to(torch.int64)
        total += (bits.mul_(column_weights).sum(1) * row_weights[start : start + step]).sum()
    return int(total.item()) % _MODULUS


def digest(shapes: Mapping[str, Sequence[int]], sums: Mapping[str, int]) -> str:
    """32 hexadecimal digits of all names, shapes and checksums, whatever their order."""
    text = "".join(f"{name}={tuple(shapes[name])}:{sums[name] % _MODULUS};" for name in sorted(sums))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_weights(names: Collection[str], get: Callable[[str], Tensor], *, dtype: torch.dtype) -> str:
    """The digest of whole tensors in ``dtype``; one at a time is in memory."""
    shapes, sums = {}, {}
    for name in names:
        tensor = get(name)
        shapes[name], sums[name] = tuple(tensor.shape), checksum(as_matrix(tensor.detach().to(dtype)))
    return digest(shapes, sums)


def _weights_of_places(first: int, count: int, salt: int, device: torch.device) -> Tensor:
    place = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    weight = (place + salt) * _MULTIPLIER
    return (weight ^ (weight >> 29)) | 1
