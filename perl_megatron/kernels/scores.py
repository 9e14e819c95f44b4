"""What the loss kernels compute of each token, from hidden states and the output weight, without T×V logits.

With the weight's row w_v of each token v, its bias b_v (-100 for a banned token, as vLLM's ``logit_bias``; else 0), and
the temperature τ of the predicted token, applied after the bias as vLLM does:

    z_v         = (hidden · w_v + b_v) / τ        p = softmax(z) over the whole vocabulary
    log_prob    = z_target - log Σ exp(z)         ∂ log_prob / ∂z_v = [v = target] - p_v
    entropy     = log Σ exp(z) - Σ p·z            ∂ entropy  / ∂z_v = -p_v (log p_v + entropy)

Defined for every input: a token with the target ``IGNORED`` has zeros throughout and no gradient, whatever its hidden
state and temperature; one whose target is not in the vocabulary has the log-probability NaN, without gradient. A logit
that is NaN or +∞, or a temperature that is not above 0, makes NaN of its token's results, and of no other's; a logit of
-∞ has probability 0, and makes the entropy NaN. An empty batch gives empty results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

BANNED_BIAS = -100.0
IGNORED = -100
"""Target of a token that does not count (torch's ``ignore_index``)."""


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary that this rank's rows of the output weight are; shards may differ in size."""

    first: int
    """Id of the first row's token."""
    size: int
    """How many rows are tokens, maybe none; the weight's rows behind them only fill it up, and are never read."""
    total: int
    """Tokens of the whole vocabulary."""
    group: dist.ProcessGroup | None = None
    """The ranks that hold it together; None: this one alone."""

    @classmethod
    def whole(cls, weight: Tensor) -> VocabularyShard:
        """All rows of ``weight``, on this rank."""
        return cls(0, len(weight), len(weight))

    @classmethod
    def padded(cls, vocabulary_size: int, num_rows: int, rank: int, group: dist.ProcessGroup | None) -> VocabularyShard:
        """The ``rank``-th of consecutive parts of ``num_rows`` rows, the last of which may go beyond the vocabulary."""
        first = rank * num_rows
        return cls(first, max(0, min(num_rows, vocabulary_size - first)), vocabulary_size, group)

    def own(self, token_ids: Sequence[int]) -> list[int]:
        """Rows of those tokens that are in this part."""
        return [token - self.first for token in token_ids if 0 <= token - self.first < self.size]


@dataclass(frozen=True)
class ScoreOptions:
    """What to compute beside the log-probability, and of which distribution."""

    temperature: float | Tensor = 1.0
    """τ > 0, for all tokens or float [T]."""
    banned_token_ids: Sequence[int] = ()
    """Tokens that get ``BANNED_BIAS``."""
    entropy: bool = True
    """Without it the entropy is zero, and the tiles take one pass less."""
    top_k: int = 0
    """How many of the most probable tokens to return."""
    gradient_buffer: Tensor | None = field(default=None, repr=False)
    """Of the weight's shape: its gradient is added here, in the buffer's dtype, and autograd gets none (megatron-core's
    ``main_grad``). So the sum over micro-batches is never rounded to the weight's dtype, and needs no second tensor."""


@dataclass(frozen=True)
class TokenScores:
    """In nats, float32 (float64 for float64 hidden states); equal on all ranks of the shard's group."""

    log_prob: Tensor
    """[T], differentiable with respect to hidden states and weight."""
    entropy: Tensor
    """[T], differentiable."""
    log_sum_exp: Tensor
    """[T]: log Σ exp(z)."""
    is_top: Tensor
    """bool [T]: no token is more probable than the target (top-1 agreement)."""
    top_log_probs: Tensor
    """[T, top_k], descending."""
    top_ids: Tensor
    """int64 [T, top_k]."""


def temperatures(options: ScoreOptions, counts: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[T]; NaN where it is not above 0, and 1 for tokens that do not count (``counts`` bool [T]). None if all are 1."""
    if not torch.is_tensor(options.temperature) and options.temperature == 1:
        return None
    temperature = torch.as_tensor(options.temperature, dtype=dtype, device=counts.device)
    return torch.where(counts, torch.where(temperature > 0, temperature, torch.nan), 1)


def dtype_of_computation(hidden: Tensor) -> torch.dtype:
    """float32, and float64 for float64: of logits, sums and accumulated gradients, whatever the inputs are in."""
    return torch.promote_types(hidden.dtype, torch.float32)


def check_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, options: ScoreOptions
) -> None:
    """ValueError where shapes, dtypes or options do not go together."""
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
                0 <= shard.size <= len(weight)
                and shard.first >= 0
                and (shard.size == 0 or shard.first + shard.size <= shard.total),
                f"{len(weight)} rows cannot hold {shard.size} of {shard.total} tokens from {shard.first} on",
            ),
            (
                (temperature.shape == hidden.shape[:1] and temperature.is_floating_point())
                if torch.is_tensor(temperature)
                else temperature > 0,
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
