"""How token losses add up to the loss of an update: weights by global counts.

The weights come from the counts of the whole mini-batch, not of a micro-batch or a rank, so that a plain sum over
tokens, micro-batches and data-parallel ranks is the loss, however the sequences were split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np


def token_weights(
    lengths: Sequence[int] | np.ndarray,
    aggregation: Literal["token", "sequence", "constant"],
    *,
    total_tokens: int,
    total_sequences: int,
    max_tokens: int | None = None,
) -> list[np.ndarray]:
    """Weight of every response token: L = Σ_i Σ_t w_{i,t} · loss_{i,t}.

        'token':    w_{i,t} = 1 / Σ_j R_j      mean over all tokens (DAPO, arXiv 2503.14476; PeRL's released code)
        'sequence': w_{i,t} = 1 / (N · R_i)    mean over sequences of their token means (PeRL Eq. 6, as GRPO's Eq. 3)
        'constant': w_{i,t} = 1 / (N · R_max)  mean over sequences of their token sums, over one constant (Dr.GRPO,
                                               arXiv 2503.20783, §3.2 and its Listing 1): no bias by length

    Over all sequences of the mini-batch, the weights of the first two add up to 1 (a response without tokens has no
    weights to add); those of 'constant' to the mean length over R_max, so a longer response weighs more.

    Args:
        lengths: int [n], the response lengths R_i of the sequences at hand (a micro-batch, a rank's share, or all).
        aggregation: which mean.
        total_tokens: Σ R_j over the whole mini-batch, all ranks.
        total_sequences: N, the number of sequences of the whole mini-batch, all ranks.
        max_tokens: R_max, the token limit of a response; only for 'constant', which needs it.

    Returns:
        one float64 [R_i] for each sequence.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert (lengths >= 0).all(), "a response length is negative"
    assert lengths.sum() <= total_tokens, "total_tokens is a count of the whole mini-batch"
    assert lengths.size <= total_sequences, "total_sequences is a count of the whole mini-batch"
    if aggregation == "token":
        return [np.full(length, 1.0 / total_tokens) for length in lengths]
    if aggregation == "constant":
        assert max_tokens is not None, "the constant of this aggregation is the token limit"
        return [np.full(length, 1.0 / (total_sequences * max_tokens)) for length in lengths]
    assert aggregation == "sequence", f"unknown aggregation {aggregation!r}"
    return [np.full(length, 1.0 / (total_sequences * max(length, 1))) for length in lengths]
