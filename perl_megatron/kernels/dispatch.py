"""The one place that chooses how the loss kernels run.

| backend | where | memory over inputs and gradients |
|---|---|---|
| ``reference`` | everywhere; the definition | all logits [T, V] and more |
| ``tiled`` | everywhere | two tiles of logits, one of the weight, a float32 gradient of the hidden states |
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from perl_megatron.kernels import reference, tiled
from perl_megatron.kernels.scores import ScoreOptions, TokenScores, VocabularyShard

Backend = Literal["reference", "tiled"]
BACKENDS: dict[Backend, ModuleType] = {"reference": reference, "tiled": tiled}


def choose_backend(wanted: Backend | Literal["auto"] = "auto") -> Backend:
    """``wanted``, or the fastest one here."""
    return "tiled" if wanted == "auto" else wanted


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    shard: VocabularyShard | None = None,
    options: ScoreOptions | None = None,
    backend: Backend | Literal["auto"] = "auto",
) -> TokenScores:
    """Log-probability, entropy and more of T tokens; see ``scores`` for what is computed.

    Args:
        hidden: [T, H], any floating dtype; equal on all ranks of the shard's group.
        weight: [rows ≥ shard.size, H], this rank's rows of the output weight, in the same dtype.
        targets: int64 [T], ids in the whole vocabulary or ``IGNORED``; equal on all ranks.
        shard: which rows these are; None: a whole vocabulary.
        options: temperature, banned tokens and what else to compute.
        backend: which one; 'auto' for the fastest.

    Raises:
        ValueError: shapes, dtypes or options do not go together. Collective: all ranks raise, or none.
    """
    options = options or ScoreOptions()
    shard = shard or VocabularyShard.whole(weight)
    _check(hidden, weight, targets, shard, options)
    score: Callable[..., TokenScores] = BACKENDS[choose_backend(backend)].score_tokens
    return score(hidden, weight, targets, shard, options)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions) -> None:
    temperature, buffer = options.temperature, options.gradient_buffer
    wrong = [
        message
        for holds, message in (
            (hidden.dim() == 2, f"hidden states must be [T, H], not {list(hidden.shape)}"),
            (
                weight.dim() == 2 and weight.shape[1:] == hidden.shape[1:],
                f"the output weight {list(weight.shape)} does not fit hidden states {list(hidden.shape)}",
            ),
            (
                hidden.is_floating_point() and weight.dtype == hidden.dtype,
                f"hidden states are {hidden.dtype} and the output weight is {weight.dtype}",
            ),
            (
                targets.shape == hidden.shape[:1] and targets.dtype == torch.int64,
                f"targets must be int64 [T], not {targets.dtype} {list(targets.shape)}",
            ),
            (
                0 <= shard.size <= len(weight) and 0 <= shard.first <= max(shard.total - shard.size, shard.first),
                f"a weight of {len(weight)} rows cannot hold the tokens from {shard.first} on, {shard.size} of them",
            ),
            (
                (temperature.shape == hidden.shape[:1]) if torch.is_tensor(temperature) else temperature > 0,
                "the temperature must be above 0, one number or float [T]",
            ),
            (0 <= options.top_k <= shard.total, f"top_k is {options.top_k} of {shard.total} tokens"),
            (
                all(0 <= token < shard.total for token in options.banned_token_ids),
                f"a banned token is not one of the {shard.total} tokens",
            ),
            (
                buffer is None or buffer.shape == weight.shape,
                "the gradient buffer must have the output weight's shape",
            ),
        )
        if not holds
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


assert set(BACKENDS) == set(get_args(Backend))
