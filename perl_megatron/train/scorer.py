"""From the policy's final hidden states to log-probabilities, the same for every use of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from perl_megatron.kernels.dispatch import Backend, choose_backend, score_tokens
from perl_megatron.kernels.scores import ScoreOptions, TokenScores, VocabularyShard
from perl_megatron.model.policy import Policy
from perl_megatron.runtime.topology import Topology
from perl_megatron.train.batch import MicroBatch


class Scorer:
    """Scores of the sampling distribution: the engine's bias on banned tokens, and `rollout.temperature`.

    Only the last pipeline stage's is called.

    Args:
        policy: this rank's last model chunk.
        topology: this rank's place.
        temperature: of sampling, above 0.
        banned: ids of the tokens that get the bias.
        kernel: `model.loss_kernel`.
    """

    def __init__(
        self,
        policy: Policy,
        topology: Topology,
        *,
        temperature: float = 1.0,
        banned: Sequence[int] = (),
        kernel: Backend | Literal["auto"] = "auto",
    ):
        self._policy = policy
        self._topology = topology
        self._temperature = temperature
        self._banned = tuple(banned)
        self._backend = choose_backend(kernel)

    def __call__(self, batch: MicroBatch, hidden: Tensor, *, entropy: bool) -> TokenScores:
        """Of each target of the micro-batch; ``hidden`` [T, H].

        The weight's gradient goes straight to megatron-core's float32 buffer, where there is one.
        """
        weight, topology = self._policy.output_weight(), self._topology
        group = topology.tensor_group() if topology.tensor_size > 1 else None
        size = self._policy.architecture.vocabulary_size
        return score_tokens(
            hidden,
            weight,
            batch.targets,
            shard=VocabularyShard.padded(size, len(weight), topology.tensor_rank, group),
            options=ScoreOptions(
                temperature=self._temperature,
                banned_token_ids=self._banned,
                entropy=entropy,
                gradient_buffer=getattr(weight, "main_grad", None),
            ),
            backend=self._backend,
        )
