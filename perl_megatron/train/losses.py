"""The losses of one micro-batch: a weighted sum over its response tokens, and the sums that metrics are made of.

Legend: T response tokens of the micro-batch that this rank predicts, row after row. The weights of the tokens are by
counts of all micro-batches and ranks, so the loss of a step is the plain sum of what is returned here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from perl_megatron.algorithm.aggregation import token_weights
from perl_megatron.algorithm.objective import (
    TokenLoss,
    cispo_objective,
    clipped_objective,
    kl_estimate,
    sequence_log_ratio,
    token_log_ratio,
)
from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.runtime.topology import Topology
from perl_megatron.train.batch import MicroBatch, TrainingSequence

Sums = dict[str, Tensor]
"""float64 scalars that add up over micro-batches and ranks; names that end in ``_max`` take the maximum."""


class Loss(Protocol):
    """A loss of one micro-batch, and what it measures."""

    names: tuple[str, ...]
    """The keys of the sums, in a fixed order: ranks that compute no loss need them too."""

    def __call__(self, batch: MicroBatch, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Sums]:
        """``log_prob`` (differentiable) and ``entropy`` are float32 [T]; gives a scalar loss and the sums."""


class PolicyLoss:
    """GRPO: L = Σ w_t (-J_t + β KL_t), PeRL Eq. 6, with weights by the counts of all ``sequences``.

    J is the clipped or the CISPO objective. With `algorithm.importance_correction` it is also multiplied by each
    token's importance weight. The KL term is left out where `algorithm.kl_in` put it into the reward.

    Args:
        sequences: the whole global mini-batch; each with ``logprob_old``, ``logprob_ref`` where the loss has a KL term,
            and ``importance`` where it is corrected for.
        algorithm: objective and its bounds, ratio, β, estimator, aggregation, importance correction.
        topology: this rank's place; None: it holds whole sequences.
        max_response_tokens: the token limit of a response, for the aggregation 'constant'.
    """

    def __init__(
        self,
        sequences: Sequence[TrainingSequence],
        algorithm: AlgorithmConfig,
        topology: Topology | None = None,
        *,
        max_response_tokens: int | None = None,
    ):
        self._algorithm = algorithm
        self._context = topology.context_group() if topology is not None and topology.context_size > 1 else None
        self._weights = _global_weights(sequences, algorithm.aggregation, max_response_tokens)
        self._advantage = [np.full(len(sequence.response), sequence.advantage) for sequence in sequences]
        self._old = _required([sequence.logprob_old for sequence in sequences], sequences)
        measured = algorithm.kl_coefficient > 0 and algorithm.kl_in == "loss"
        self._ref = _required([sequence.logprob_ref for sequence in sequences], sequences) if measured else None
        corrected = algorithm.importance_correction != "off"
        self._importance = _required([sequence.importance for sequence in sequences], sequences) if corrected else None
        self.names: tuple[str, ...] = (
            "loss",
            "policy_loss",
            "kl",
            "entropy",
            "clip_fraction_low",
            "clip_fraction_high",
            "clip_fraction_dual",
            "ratio_mean",
            "ratio_max",
        )

    def __call__(self, batch: MicroBatch, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Sums]:
        """See ``Loss``. KL is 0 in the sums where the loss has no KL term: it is not measured then."""
        algorithm, device = self._algorithm, log_prob.device
        weight = _row(self._weights, batch, device)
        token = self._objective(batch, log_prob)
        token_loss = token.loss
        if self._importance is not None:
            token_loss = _row(self._importance, batch, device) * token_loss
        loss = policy_loss = (weight * token_loss).sum()
        kl = torch.zeros((), device=device)
        if self._ref is not None:
            kl = (weight * kl_estimate(log_prob, _row(self._ref, batch, device), algorithm.kl_estimator)).sum()
            loss = loss + algorithm.kl_coefficient * kl
        ratio_max = token.ratio.max() if batch.num_tokens else torch.zeros((), device=device)
        sums = (
            loss,
            policy_loss,
            kl,
            entropy.sum(),
            token.clipped_low.sum(),
            token.clipped_high.sum(),
            token.clipped_dual.sum(),
            token.ratio.sum(),
            ratio_max,
        )
        return loss, _detached(self.names, sums)

    def _objective(self, batch: MicroBatch, log_prob: Tensor) -> TokenLoss:
        """`algorithm.objective` of each token, negated, [T]."""
        algorithm, device = self._algorithm, log_prob.device
        log_ratio = self._log_ratio(batch, token_log_ratio(log_prob, _row(self._old, batch, device)))
        advantage = _row(self._advantage, batch, device)
        if algorithm.objective == "cispo":
            return cispo_objective(log_prob, log_ratio, advantage, low=algorithm.cispo_low, high=algorithm.cispo_high)
        return clipped_objective(
            log_ratio,
            advantage,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )

    def _log_ratio(self, batch: MicroBatch, log_ratio: Tensor) -> Tensor:
        """Of the granularity `algorithm.ratio`, [T]."""
        if self._algorithm.ratio == "token":
            return log_ratio
        lengths = torch.from_numpy(batch.lengths).to(log_ratio.device)
        row = torch.from_numpy(np.repeat(np.arange(len(batch.lengths)), batch.lengths)[batch.own_tokens])
        row = row.to(log_ratio.device)
        totals = torch.zeros(len(lengths), dtype=log_ratio.dtype, device=log_ratio.device)
        totals.index_add_(0, row, log_ratio.detach())
        if self._context is not None:
            dist.all_reduce(totals, group=self._context)
        mean = self._algorithm.ratio == "sequence_mean"
        return sequence_log_ratio(log_ratio, totals[row], lengths[row], mean=mean)


class SupervisedLoss:
    """Mean token cross-entropy over the response tokens of all ``sequences``."""

    names: tuple[str, ...] = ("loss", "entropy")

    def __init__(self, sequences: Sequence[TrainingSequence]):
        self._weights = _global_weights(sequences, "token")

    def __call__(self, batch: MicroBatch, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Sums]:
        """See ``Loss``."""
        loss = -(_row(self._weights, batch, log_prob.device) * log_prob).sum()
        return loss, _detached(self.names, (loss, entropy.sum()))


def _global_weights(
    sequences: Sequence[TrainingSequence],
    aggregation: Literal["token", "sequence", "constant"],
    max_tokens: int | None = None,
) -> list[np.ndarray]:
    lengths = [len(sequence.response) for sequence in sequences]
    totals = {"total_tokens": sum(lengths), "total_sequences": len(lengths)}
    return token_weights(lengths, aggregation, max_tokens=max_tokens, **totals)


def _required(values: Sequence[np.ndarray | None], sequences: Sequence[TrainingSequence]) -> list[np.ndarray]:
    present = [value for value in values if value is not None]
    assert len(present) == len(values), "every sequence needs its log-probabilities and weights before an update"
    assert all(len(value) == len(sequence.response) for value, sequence in zip(present, sequences, strict=True))
    return present


def _row(values: Sequence[np.ndarray], batch: MicroBatch, device: torch.device) -> Tensor:
    """The values of this rank's tokens of the micro-batch, float32 [T], in the order of its targets."""
    if not batch.indices:
        return torch.zeros(0, device=device)
    row = np.concatenate([values[index] for index in batch.indices])[batch.own_tokens]
    return torch.from_numpy(row.astype(np.float32)).to(device)


def _detached(names: Sequence[str], values: Sequence[Tensor]) -> Sums:
    return {name: value.detach().double() for name, value in zip(names, values, strict=True)}
