"""A batch's logits on this rank, one tile of tokens × vocabulary at a time.

The tiles of the output weight are the outer loop, so that each is converted once; those of the tokens the inner.

Batch invariance: the tokens' last tile is filled up with zeros, so each product has the same shape whatever T is (what
comes after goes row by row), and a token meets the vocabulary's tiles in the same order whatever else is in the batch.
Backends whose products add up each row in one order, however many rows there are, need no filling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from perl_megatron.kernels import native
from perl_megatron.kernels.scores import (
    BANNED_BIAS,
    IGNORED,
    ScoreOptions,
    VocabularyShard,
    dtype_of_computation,
    temperatures,
)

TOKENS, FEW_TOKENS = 512, 128
"""Tokens of a tile, for a large vocabulary and for a small one: a toy's, whose batches have few tokens."""
LARGE_VOCABULARY = 8192
"""Rows of the weight on this rank."""
ROWS = 2048
"""Vocabulary rows of a tile."""
NATIVE_SIDE = 2048
"""Tokens and rows of a tile of a large vocabulary for ``native``'s products, which lay each operand out anew."""


@dataclass(frozen=True)
class TileShape:
    """Of a tile of logits."""

    tokens: int
    rows: int


def shape_of_tile(shard: VocabularyShard, *, native_products: bool) -> TileShape:
    """Not by the number of tokens, so that a token's tile does not depend on its batch."""
    if native_products and shard.size >= LARGE_VOCABULARY:
        return TileShape(NATIVE_SIDE, NATIVE_SIDE)
    return TileShape(TOKENS if shard.size >= LARGE_VOCABULARY else FEW_TOKENS, ROWS)


class Tiles:
    """The logits of one batch on this rank, a tile at a time.

    Args:
        hidden: [T, H].
        weight: [rows, H].
        targets: int64 [T].
        shard: which rows these are.
        options: temperature and banned tokens.
        shape: of a tile; None: ``shape_of_tile``.
        fill: whether the last tile of tokens is filled up; without it, hidden states are copied only where some of
            their tokens do not count.
        native_products: whether ``native`` may multiply bfloat16 operands on the CPU.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        options: ScoreOptions,
        *,
        shape: TileShape | None = None,
        fill: bool = True,
        native_products: bool = True,
    ):
        self.dtype = dtype_of_computation(hidden)
        # Where no product of 16-bit numbers has float32 sums, tiles are converted.
        self.native_products = native_products and hidden.dtype == torch.bfloat16 and native.why_not() is None
        """Whether ``native`` multiplies the operands."""
        self.operand_dtype = hidden.dtype if hidden.is_cuda or self.native_products else self.dtype
        self.shard = shard
        self.shape = shape or shape_of_tile(shard, native_products=self.native_products)
        self.num_tokens = len(hidden)
        self.hidden, self.weight = hidden, weight
        self.counts = targets != IGNORED
        self.known = (targets >= 0) & (targets < shard.total)
        self._has_ignored = not bool(self.counts.all())
        # Products by ``native`` add each row up in the same order, however many rows there are.
        self._fill = fill and not self.native_products
        self._tile_tokens = self.shape.tokens if self._fill else min(self.shape.tokens, self.num_tokens)
        self._copies = self._fill or self._has_ignored or hidden.dtype != self.operand_dtype
        self.column = torch.where(self.known, targets - shard.first, -1)
        """int64 [T]: the target's row on this rank; outside of 0 … size where it is not here."""
        temperature = temperatures(options, self.counts, self.dtype)
        self.scale = None if temperature is None else temperature.reciprocal()
        """[T]: 1 / τ; None where all are 1."""
        self._scratch: Tensor | None = None
        self.banned = sorted(shard.own(options.banned_token_ids))
        """This rank's rows that get the bias."""

    def _new_operand(self, rows: int) -> Tensor:
        """[rows, H], where part of an input is copied to."""
        return self.hidden.new_empty(rows, self.hidden.shape[1], dtype=self.operand_dtype)

    @cached_property
    def _tile(self) -> Tensor:
        return self._new_operand(self._tile_tokens)

    @cached_property
    def _weight_tile(self) -> Tensor | None:
        return None if self.weight.dtype == self.operand_dtype else self._new_operand(self.shape.rows)

    @cached_property
    def _logits(self) -> Tensor:
        return self.hidden.new_empty(self._tile_tokens * self.shape.rows, dtype=self.dtype)

    @cached_property
    def _transposed(self) -> Tensor:
        return self.hidden.new_empty(self._tile_tokens * self.shape.rows, dtype=self.operand_dtype)

    def scratch(self, z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Of the shape of ``z``, in its dtype or ``dtype``; overwritten by the next call."""
        if self._scratch is None:
            self._scratch = torch.empty_like(self._logits, dtype=dtype)
        assert self._scratch.dtype == (dtype or self.dtype), "one kind of scratch for a batch"
        return self._scratch[: z.numel()].view(z.shape)

    def transposed_scratch(self, z: Tensor) -> Tensor:
        """[rows, tokens] of a tile z [tokens, rows], as an operand; overwritten by the next call."""
        return self._transposed[: z.numel()].view(z.shape[1], z.shape[0])

    def lowest(self) -> Tensor:
        """[T]: where running maxima start; finite, so that 0 times a difference to it is 0."""
        return self.new_values(torch.finfo(self.dtype).min / 2)

    def new_values(self, value: float) -> Tensor:
        """[T] of ``value``."""
        return torch.full((self.num_tokens,), value, dtype=self.dtype, device=self.hidden.device)

    def row_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows, and the weight's [rows, H] as an operand; valid until the next one. None without tokens."""
        num_rows = self.shard.size if self.num_tokens else 0
        for first in range(0, num_rows, self.shape.rows):
            rows = slice(first, min(first + self.shape.rows, num_rows))
            part = self.weight[rows]
            yield rows, part if self._weight_tile is None else self._weight_tile[: len(part)].copy_(part)

    def token_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive tokens, and their hidden states [≥ tokens, H] as an operand; zeros for those that do not count.

        The operand is valid until the next one.
        """
        for first in range(0, self.num_tokens, self.shape.tokens):
            real = min(self.shape.tokens, self.num_tokens - first)
            tokens = slice(first, first + real)
            if not self._copies:
                yield tokens, self.hidden[tokens]
                continue
            self._tile[:real] = self.hidden[tokens]
            if self._has_ignored:
                self._tile[:real].masked_fill_(~self.counts[tokens, None], 0)
            self._tile[real:] = 0
            yield tokens, self._tile if self._fill else self._tile[:real]

    def logits(self, tokens: slice, tile: Tensor, rows: slice, weight: Tensor) -> Tensor:
        """z [tokens, rows], overwritten by the next call."""
        count, real = rows.stop - rows.start, tokens.stop - tokens.start
        z = self._logits[: len(tile) * count].view(-1, count)
        multiply(tile, weight.t(), out=z)
        z = z[:real]
        banned = [token - rows.start for token in self.banned if rows.start <= token < rows.stop]
        if banned:
            z[:, banned] += BANNED_BIAS
        if self.scale is not None:
            z *= self.scale[tokens, None]
        return z

    def targets_in(self, tokens: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """(bool [tokens] whether the target is among the rows, int64 [tokens, 1] its column, any where it is not)."""
        column = self.column[tokens] - rows.start
        here = (column >= 0) & (column < rows.stop - rows.start)
        return here, column.clamp(0, rows.stop - rows.start - 1)[:, None]


def multiply(first: Tensor, second: Tensor, out: Tensor) -> None:
    """``out`` = first · second, summed in float32 where they are shorter, and rounded once to out's dtype."""
    if out.device.type == "cpu" and first.dtype == torch.bfloat16:
        native.multiply(out, first, second, add=False)
    elif first.dtype == out.dtype:
        torch.mm(first, second, out=out)
    else:
        torch.mm(first, second, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """``total`` += first · second, summed in total's dtype."""
    if first.dtype == total.dtype:
        total.addmm_(first, second)
    elif total.device.type == "cpu":
        native.multiply(total, first, second, add=True)
    else:
        total += torch.mm(first, second, out_dtype=total.dtype)
