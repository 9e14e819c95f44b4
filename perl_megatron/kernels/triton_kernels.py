"""The Triton kernels of ``scores``: sums over logits that are never stored, and one tile of their gradient.

Legend: T tokens, H hidden size, R vocabulary rows on this rank, S splits of these rows. A logit is
z = (hidden · weight + bias) · scale, in float32 whatever the inputs are in; scale is 1 / τ. (Where scale is float64,
so is all else: for tests.)

Style, so that Triton's interpreter computes the same on a CPU: 16-bit numbers are only loaded, multiplied by ``dot``
and stored. No atomics, and every sum has a fixed order, which does not depend on T: results are deterministic, and a
token's forward results are the same bits whatever else is in its batch. HALVES folds a block in two halves, which
needs fewer registers.

``ahead_of_time.py`` compiles them for every target without a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.7014117331926443e38)
"""Where running maxima start (half of float32's lowest): finite, so that 0 times a difference to it is 0."""


@triton.jit
def _products(
    hidden,
    weight,
    first_token,
    first_row,
    num_tokens,
    num_rows,
    stride_hidden,
    stride_weight,
    H: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """hidden · weight of one block, [BLOCK_TOKENS, BLOCK_ROWS] in DTYPE; whatever lies beyond T, R or H counts as 0.

    With DESCRIPTORS, hidden [T, H] and weight [R, H] are tensor descriptors (a copy engine loads their blocks).
    """
    total = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), DTYPE)
    if DESCRIPTORS:
        for h in tl.range(0, H, BLOCK_HIDDEN):
            tokens = hidden.load([first_token, h])
            rows = weight.load([first_row, h])
            total = tl.dot(tokens, rows.T, total, input_precision="ieee", out_dtype=DTYPE)
    else:
        token = first_token + tl.arange(0, BLOCK_TOKENS)
        row = first_row + tl.arange(0, BLOCK_ROWS)
        column = tl.arange(0, BLOCK_HIDDEN)
        hidden_at = hidden + token[:, None].to(tl.int64) * stride_hidden + column[None, :]
        weight_at = weight + row[None, :].to(tl.int64) * stride_weight + column[:, None]
        for h in tl.range(0, H, BLOCK_HIDDEN):
            inside = column + h < H
            tokens = tl.load(hidden_at, mask=(token < num_tokens)[:, None] & inside[None, :], other=0.0)
            rows = tl.load(weight_at, mask=(row < num_rows)[None, :] & inside[:, None], other=0.0)
            total = tl.dot(tokens, rows, total, input_precision="ieee", out_dtype=DTYPE)
            hidden_at += BLOCK_HIDDEN
            weight_at += BLOCK_HIDDEN
    return total


@triton.jit
def _fold(z, row, end, bias, factor, wanted, m, s, a, z_target, ENTROPY: tl.constexpr):
    """The sums of ``sums.Sums`` over one more block of products z [BLOCK_TOKENS, rows], whose rows are ``row``."""
    is_row = (row < end)[None, :]
    z = (z + tl.load(bias + row, mask=row < end, other=0.0)[None, :]) * factor[:, None]
    z_target += tl.sum(tl.where((row[None, :] == wanted[:, None]) & is_row, z, 0.0), 1)
    z = tl.where(is_row, z, float("-inf"))
    new = tl.maximum(m, tl.max(z, 1))
    change = m - new
    decay = tl.exp(change)
    z -= new[:, None]
    e = tl.exp(z)
    if ENTROPY:
        a = (a + s * change) * decay + tl.sum(tl.where(is_row, e * z, 0.0), 1)
    return new, s * decay + tl.sum(e, 1), a, z_target


@triton.jit
def add_up_splits(
    hidden,
    weight,
    bias,
    scale,
    column,
    maximum,
    total,
    weighted,
    target,
    num_tokens,
    num_rows,
    rows_of_split,
    stride_hidden,
    stride_weight,
    H: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    HALVES: tl.constexpr,
    ENTROPY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Forward, grid (⌈T / BLOCK_TOKENS⌉, S): the ``sums.Sums`` of each token over each split of the rows.

    bias [R], scale [T], column int64 [T] (the target's row, outside of 0 … R where it is not here); maximum, total,
    weighted and target are float32 [S, T]. Blocks of one split run side by side, so they share the weight in the cache.
    """
    first_token = tl.program_id(0) * BLOCK_TOKENS
    split = tl.program_id(1)
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    is_token = token < num_tokens
    wanted = tl.load(column + token, mask=is_token, other=-1).to(tl.int32)
    factor = tl.load(scale + token, mask=is_token, other=1.0)
    DTYPE: tl.constexpr = scale.dtype.element_ty
    m = tl.full((BLOCK_TOKENS,), LOWEST, DTYPE)
    s = tl.zeros((BLOCK_TOKENS,), DTYPE)
    a = tl.zeros((BLOCK_TOKENS,), DTYPE)
    z_target = tl.zeros((BLOCK_TOKENS,), DTYPE)
    end = tl.minimum((split + 1) * rows_of_split, num_rows)
    for first_row in tl.range(split * rows_of_split, end, BLOCK_ROWS):
        z = _products(
            hidden,
            weight,
            first_token,
            first_row,
            num_tokens,
            num_rows,
            stride_hidden,
            stride_weight,
            H,
            BLOCK_TOKENS,
            BLOCK_ROWS,
            BLOCK_HIDDEN,
            DESCRIPTORS,
            DTYPE,
        )
        if HALVES:
            row = first_row + tl.arange(0, BLOCK_ROWS // 2)
            low, high = tl.split(tl.permute(tl.reshape(z, (BLOCK_TOKENS, 2, BLOCK_ROWS // 2)), (0, 2, 1)))
            m, s, a, z_target = _fold(low, row, end, bias, factor, wanted, m, s, a, z_target, ENTROPY)
            row += BLOCK_ROWS // 2
            m, s, a, z_target = _fold(high, row, end, bias, factor, wanted, m, s, a, z_target, ENTROPY)
        else:
            row = first_row + tl.arange(0, BLOCK_ROWS)
            m, s, a, z_target = _fold(z, row, end, bias, factor, wanted, m, s, a, z_target, ENTROPY)
    at = split.to(tl.int64) * num_tokens + token
    tl.store(maximum + at, m, mask=is_token)
    tl.store(total + at, s, mask=is_token)
    tl.store(target + at, z_target, mask=is_token)
    if ENTROPY:
        tl.store(weighted + at, a, mask=is_token)


@triton.jit
def combine_splits(
    maximum, total, weighted, target, num_tokens, num_splits, BLOCK_TOKENS: tl.constexpr, ENTROPY: tl.constexpr
):
    """Forward, grid (⌈T / BLOCK_TOKENS⌉,): the sums of all splits, into the first row of each [S, T]."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < num_tokens
    m = tl.load(maximum + token, mask=is_token, other=0.0)
    s = tl.load(total + token, mask=is_token, other=0.0)
    a = tl.zeros_like(s)
    if ENTROPY:
        a = tl.load(weighted + token, mask=is_token, other=0.0)
    z_target = tl.load(target + token, mask=is_token, other=0.0)
    at = token.to(tl.int64)
    for _ in tl.range(1, num_splits):
        at += num_tokens
        other = tl.load(maximum + at, mask=is_token, other=0.0)
        new = tl.maximum(m, other)
        ours = m - new
        theirs = other - new
        other_s = tl.load(total + at, mask=is_token, other=0.0)
        if ENTROPY:
            other_a = tl.load(weighted + at, mask=is_token, other=0.0)
            a = (a + s * ours) * tl.exp(ours) + (other_a + other_s * theirs) * tl.exp(theirs)
        s = s * tl.exp(ours) + other_s * tl.exp(theirs)
        z_target += tl.load(target + at, mask=is_token, other=0.0)
        m = new
    tl.store(maximum + token, m, mask=is_token)
    tl.store(total + token, s, mask=is_token)
    tl.store(target + token, z_target, mask=is_token)
    if ENTROPY:
        tl.store(weighted + token, a, mask=is_token)


@triton.jit
def logits_gradient(
    hidden,
    weight,
    bias,
    scale,
    column,
    maximum,
    by_log_prob,
    constant,
    by_entropy,
    result,
    num_tokens,
    num_rows,
    stride_hidden,
    stride_weight,
    H: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Backward, a grid of all blocks of T × R, which are one tile's: its logits again, and their gradient.

    The gradient is that of ``fused.Coefficients``, whose float32 [T] are ``maximum``, ``by_log_prob``, ``constant`` and
    ``by_entropy``; it goes to result [T, R], rounded to its dtype. Without GRADIENT the logits go
    there. GROUP blocks of tokens go over the same rows before the next rows, so that both stay in the cache.
    """
    num_token_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS)
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    first_block = tl.program_id(0) // (GROUP * num_row_blocks) * GROUP
    height = tl.minimum(num_token_blocks - first_block, GROUP)
    within = tl.program_id(0) % (GROUP * num_row_blocks)
    first_token = (first_block + within % height) * BLOCK_TOKENS
    first_row = within // height * BLOCK_ROWS
    z = _products(
        hidden,
        weight,
        first_token,
        first_row,
        num_tokens,
        num_rows,
        stride_hidden,
        stride_weight,
        H,
        BLOCK_TOKENS,
        BLOCK_ROWS,
        BLOCK_HIDDEN,
        DESCRIPTORS,
        scale.dtype.element_ty,
    )
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    is_token = token < num_tokens
    is_row = row < num_rows
    factor = tl.load(scale + token, mask=is_token, other=1.0)
    z = (z + tl.load(bias + row, mask=is_row, other=0.0)[None, :]) * factor[:, None]
    if GRADIENT:
        wanted = tl.load(column + token, mask=is_token, other=-1).to(tl.int32)
        z -= tl.load(maximum + token, mask=is_token, other=0.0)[:, None]
        outer = tl.load(constant + token, mask=is_token, other=0.0)[:, None]
        at_target = tl.load(by_log_prob + token, mask=is_token, other=0.0)[:, None]
        e = tl.exp(z)
        if ENTROPY:
            outer += z * tl.load(by_entropy + token, mask=is_token, other=0.0)[:, None]
        z = tl.where(row[None, :] == wanted[:, None], at_target, 0.0) - e * outer
    at = token[:, None].to(tl.int64) * num_rows + row[None, :]
    tl.store(result + at, z.to(result.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])
