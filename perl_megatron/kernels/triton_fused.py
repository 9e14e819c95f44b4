"""``scores`` by Triton kernels, on CUDA and ROCm: forward, logits exist in registers only; backward, one tile of their
gradient is in memory, in the inputs' dtype, for the two products that torch makes of it.

Deterministic, and batch-invariant forward (see ``triton_kernels``). Triton's interpreter (`TRITON_INTERPRET=1`) runs it
on a CPU, for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from perl_megatron.kernels import fused, triton_kernels, triton_settings
from perl_megatron.kernels.fused import Coefficients
from perl_megatron.kernels.scores import BANNED_BIAS, ScoreOptions, TokenScores, VocabularyShard
from perl_megatron.kernels.sums import Sums, Top
from perl_megatron.kernels.tiles import Tiles
from perl_megatron.kernels.triton_settings import COMBINE_TOKENS, GROUP, Launch


def score_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions
) -> TokenScores:
    """See ``dispatch.score_tokens``; ValueError for float64 inputs on a GPU."""
    return fused.score_tokens(_TritonPasses(), hidden, weight, targets, shard, options)


def _aligned(matrix: Tensor) -> Tensor:
    """With contiguous rows that begin at multiples of 16 bytes, as descriptors need them and wide loads like them.

    Sizes of real models are so; others are copied.
    """
    width = 16 // matrix.element_size()
    if matrix.stride(1) == 1 and matrix.stride(0) % width == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    return _empty_aligned(matrix.shape[0], matrix.shape[1], matrix, matrix.dtype).copy_(matrix)


def _empty_aligned(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    width = 16 // dtype.itemsize
    return like.new_empty(rows, -(-columns // width) * width, dtype=dtype)[:, :columns]


class _TritonTiles(Tiles):
    """With what the kernels read of each row and of each token."""

    def _new_operand(self, rows: int) -> Tensor:
        return _empty_aligned(rows, self.hidden.shape[1], self.hidden, self.operand_dtype)

    @cached_property
    def bias(self) -> Tensor:
        """float32 [rows]."""
        bias = torch.zeros(max(1, self.shard.size), dtype=self.dtype, device=self.hidden.device)
        bias[self.banned] = BANNED_BIAS
        return bias

    @cached_property
    def factor(self) -> Tensor:
        """float32 [T]: 1 / τ."""
        return self.new_values(1) if self.scale is None else self.scale


class _TritonPasses:
    """See ``fused.TilePasses``."""

    def make_tiles(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions
    ) -> _TritonTiles:
        return _TritonTiles(
            _aligned(hidden),
            _aligned(weight),
            targets,
            shard,
            options,
            shape=triton_settings.TILE,
            fill=False,
            native_products=False,
        )

    def add_up(self, tiles: _TritonTiles, top: Top, *, entropy: bool) -> Sums:
        if not tiles.num_tokens or not tiles.shard.size:
            return Sums.none(tiles)
        self._add_up_top(tiles, top)
        launch = triton_settings.settings_for(tiles.hidden.device, tiles.hidden.dtype).forward
        rows_of_split = triton_settings.ROWS_OF_SPLIT
        num_splits = triton.cdiv(tiles.shard.size, rows_of_split)
        sums = torch.empty(4, num_splits, tiles.num_tokens, dtype=tiles.dtype, device=tiles.hidden.device)
        weight = tiles.weight[: tiles.shard.size]
        operands, constants = _arguments(tiles.hidden, weight, launch)
        grid = (triton.cdiv(tiles.num_tokens, launch.tokens), num_splits)
        with _on(tiles.hidden.device):
            triton_kernels.add_up_splits[grid](
                *operands,
                tiles.bias,
                tiles.factor,
                tiles.column,
                *sums,
                tiles.num_tokens,
                tiles.shard.size,
                rows_of_split,
                tiles.hidden.stride(0),
                weight.stride(0),
                **constants,
                HALVES=launch.halves,
                ENTROPY=entropy,
            )
            triton_kernels.combine_splits[(triton.cdiv(tiles.num_tokens, COMBINE_TOKENS),)](
                *sums, tiles.num_tokens, num_splits, BLOCK_TOKENS=COMBINE_TOKENS, ENTROPY=entropy
            )
        # Those that do not count may hold anything, and the kernels have read it.
        maximum, total, weighted, target = torch.where(tiles.counts, sums[:, 0], 0)
        return Sums(maximum, torch.where(tiles.counts, total, 1), weighted, target)

    def _add_up_top(self, tiles: _TritonTiles, top: Top) -> None:
        """A pass of its own over tiles of logits, where asked."""
        if not top.k:
            return
        for rows, weight in tiles.row_tiles():
            for tokens, tile in tiles.token_tiles():
                top.fold(tokens, self._tile(tiles, None, tokens, tile, rows, weight), rows)

    def logits_gradient(
        self, tiles: _TritonTiles, coefficients: Coefficients, tokens: slice, tile: Tensor, rows: slice, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient = self._tile(tiles, coefficients, tokens, tile, rows, weight)
        return gradient, gradient.t()

    def _tile(
        self,
        tiles: _TritonTiles,
        coefficients: Coefficients | None,
        tokens: slice,
        tile: Tensor,
        rows: slice,
        weight: Tensor,
    ) -> Tensor:
        """A tile's gradient; without coefficients, its logits in float32."""
        launch = triton_settings.settings_for(tile.device, tile.dtype).backward
        shape = (tokens.stop - tokens.start, rows.stop - rows.start)
        result = tile.new_empty(shape, dtype=tile.dtype if coefficients else tiles.dtype)
        unused = tiles.factor
        per_token = [unused] * 4
        if coefficients:
            by_entropy = unused if coefficients.by_entropy is None else coefficients.by_entropy
            per_token = [coefficients.maximum, coefficients.by_log_prob, coefficients.constant, by_entropy]
        operands, constants = _arguments(tile, weight, launch)
        grid = (triton.cdiv(shape[0], launch.tokens) * triton.cdiv(shape[1], launch.rows),)
        with _on(tile.device):
            triton_kernels.logits_gradient[grid](
                *operands,
                tiles.bias[rows],
                tiles.factor[tokens],
                tiles.column[tokens] - rows.start,
                *(each[tokens] for each in per_token),
                result,
                *shape,
                tile.stride(0),
                weight.stride(0),
                **constants,
                GROUP=GROUP,
                ENTROPY=bool(coefficients and coefficients.by_entropy is not None),
                GRADIENT=coefficients is not None,
            )
        return result


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _arguments(hidden: Tensor, weight: Tensor, launch: Launch) -> tuple[list[Any], dict[str, Any]]:
    """(hidden states and weight as the kernels take them, how blocks are cut)."""
    operands: list[Any] = [hidden, weight]
    if launch.descriptors:
        blocks = [launch.tokens, launch.hidden], [launch.rows, launch.hidden]
        operands = [TensorDescriptor.from_tensor(*each) for each in zip(operands, blocks, strict=True)]
    constants = {
        "H": hidden.shape[1],
        "BLOCK_TOKENS": launch.tokens,
        "BLOCK_ROWS": launch.rows,
        "BLOCK_HIDDEN": launch.hidden,
        "DESCRIPTORS": launch.descriptors,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    return operands, constants
