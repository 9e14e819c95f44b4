"""The one place that chooses how the loss kernels run.

| backend | where | memory over inputs and gradients |
|---|---|---|
| ``reference`` | everywhere; the definition | all logits [T, V] and more |
| ``tiled`` | everywhere | two tiles, one of the weight and its gradient, a float32 gradient of the hidden states |
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

from torch import Tensor

from perl_megatron.kernels import reference, tiled
from perl_megatron.kernels.scores import ScoreOptions, TokenScores, VocabularyShard, check_inputs

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
        ValueError: shapes, dtypes or options do not go together. Each rank looks at its own: with a group, one that
            raises leaves the others waiting, as in any collective.
    """
    options = options or ScoreOptions()
    shard = shard or VocabularyShard.whole(weight)
    check_inputs(hidden, weight, targets, shard, options)
    score: Callable[..., TokenScores] = BACKENDS[choose_backend(backend)].score_tokens
    return score(hidden, weight, targets, shard, options)


assert set(BACKENDS) == set(get_args(Backend))
