"""The policy under training: log-probabilities, updates, weights for the engine, checkpoints.

Every method is collective: all ranks call it with the same arguments, and all get the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from perl_megatron.batching.cost import CostModel
from perl_megatron.checkpoint import stream
from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.retention import Retention
from perl_megatron.checkpoint.state import load_training_state, newest_checkpoint, prepare_training_state
from perl_megatron.checkpoint.state_parts import StatePlanner
from perl_megatron.config.derive_model import fp8_alignment
from perl_megatron.config.schema import Config
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.policy import build_policy
from perl_megatron.runtime import platform
from perl_megatron.runtime.topology import Topology
from perl_megatron.train.batch import MicroBatch, TrainingSequence
from perl_megatron.train.batch_layout import BatchLayout
from perl_megatron.train.losses import Loss, PolicyLoss, Sums, SupervisedLoss
from perl_megatron.train.optimizer import Optimizer
from perl_megatron.train.parts import trains_images
from perl_megatron.train.reference import ReferenceWeights
from perl_megatron.train.schedule import Schedule, add_up, contributes
from perl_megatron.train.scorer import Scorer

TOKEN_MEANS = ("entropy", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "ratio_mean")
"""Statistics that are means over all response tokens (the others carry their weights already)."""


class Actor:
    """The Megatron policy of `model.path` with its optimizer.

    Log-probabilities are those of the sampling distribution: logits get the engine's bias on the banned tokens and are
    divided by `rollout.temperature`.

    Args:
        config: the whole configuration.
        topology: this rank's place.
        encoder: gives the pixels of the images that prompts name, and the special token ids.
        total_steps: optimizer updates of the whole run (training steps × updates per step), for the schedule.
    """

    def __init__(self, config: Config, topology: Topology, encoder: PromptEncoder, *, total_steps: int):
        self.config = config
        self._topology = topology
        self.architecture = read_architecture(config.model.path)
        self.modules = build_policy(self.architecture, config.model, config.parallel, topology)
        for module in self.modules:
            module.to(platform.device())
        stream.import_weights(self.modules, self.architecture, topology, open_checkpoint(config.model.path))
        self.optimizer = Optimizer(config.optimizer, self.modules, total_steps=total_steps)
        self._scorer = Scorer(
            self.modules[-1],
            topology,
            temperature=config.rollout.temperature,
            banned=encoder.banned_token_ids,
            kernel=config.model.loss_kernel,
        )
        self._reference = ReferenceWeights(self.modules) if config.algorithm.kl_coefficient > 0 else None
        layout = BatchLayout(
            topology,
            encoder,
            CostModel(self.architecture.numbers, config.actor.sharing, vision_backward=trains_images(config.optimizer)),
            actor=config.actor,
            parallel=config.parallel,
            alignment=fp8_alignment(config.model),
        )
        self._schedule = Schedule(self.optimizer.chunks, topology, layout)
        self._checkpoints = StatePlanner()

    def log_probs(self, sequences: Sequence[TrainingSequence]) -> list[np.ndarray]:
        """float32 [R] for each sequence: the policy's log-probability of each response token.

        The same forward pass as ``update``'s, so the ratio of an update with unchanged weights is 1.
        """
        starts = np.concatenate([[0], np.cumsum([len(sequence.response) for sequence in sequences])]).astype(np.int64)
        values = torch.zeros(int(starts[-1]), dtype=torch.float32, device=platform.device())
        if len(values) == 0:
            return [np.zeros(0, dtype=np.float32) for _ in sequences]
        results = self._schedule.run(sequences, self._keep_log_prob, forward_only=True)
        if contributes(self._topology):
            for batch, kept in results:
                values[torch.from_numpy(batch.places(starts)).to(values.device)] = kept["log_prob"]
        dist.all_reduce(values)
        return np.split(values.cpu().numpy(), starts[1:-1])

    def reference_log_probs(self, sequences: Sequence[TrainingSequence]) -> list[np.ndarray]:
        """float32 [R] for each sequence, under the weights of `model.path`; needs `algorithm.kl_coefficient` > 0."""
        assert self._reference is not None, "the reference policy is kept only where kl_coefficient > 0"
        with self._reference.in_place():
            return self.log_probs(sequences)

    def update(self, sequences: Sequence[TrainingSequence]) -> dict[str, float]:
        """One optimizer step of GRPO over this global mini-batch; the sequences carry log-probabilities and advantages.

        Returns global metrics: ``loss`` = ``policy_loss`` + β ``kl`` (weighted sums), means over tokens ``entropy``,
        ``clip_fraction_low/high/dual`` and ``ratio_mean``, ``ratio_max``, ``gradient_norm`` (before clipping),
        ``learning_rate``, ``num_tokens``, ``num_sequences``, and ``skipped_updates`` (1 where loss or gradient was not
        finite on any rank, and the weights stayed as they were on all).
        """
        return self._step(sequences, self._policy_loss(sequences))

    def supervised_update(self, sequences: Sequence[TrainingSequence]) -> dict[str, float]:
        """One optimizer step of mean token cross-entropy over the responses; metrics as in ``update``, fewer."""
        return self._step(sequences, SupervisedLoss(sequences))

    def gradients(self, sequences: Sequence[TrainingSequence], *, supervised: bool = False) -> dict[str, float]:
        """The sums of the loss and ``gradient_norm``, as in an update; the gradients stay in the buffers, unapplied."""
        loss = SupervisedLoss(sequences) if supervised else self._policy_loss(sequences)
        return self._step(sequences, loss, apply=False)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor), one at a time, on every rank; to be read before the policy changes.

        What is returned can be iterated again, and then gives the weights of that time.
        """
        return _PolicyWeights(self)

    def save(self, directory: Path, step: int, extra: dict[str, Any]) -> Path:
        """Write a checkpoint below ``directory``; ``extra`` must be JSON. Returns the checkpoint's folder."""
        return self.prepare_save(directory, step, extra, Retention(self.config.run.keep_checkpoints))()

    def prepare_save(
        self, directory: Path, step: int, extra: dict[str, Any], retention: Retention
    ) -> Callable[[], Path]:
        """Copy the state as it is now; what is returned writes it, as ``save`` does, while updates go on.

        Raises UserError as ``checkpoint.state.prepare_training_state``.
        """
        return prepare_training_state(
            directory,
            step,
            self.modules,
            self.optimizer.megatron,
            self.optimizer.scheduler,
            extra,
            settings=self.optimizer.settings,
            model=self._identity,
            retention=retention,
            planner=self._checkpoints,
        )

    def newest_checkpoint(self, directory: Path, *, run: str | None) -> Path | None:
        """The newest good checkpoint of this policy and this run below ``directory``; others are passed over, named."""
        return newest_checkpoint(directory, run=run, model=self._identity)

    def restore(self, checkpoint: Path, *, verify: bool = True) -> dict[str, Any]:
        """Take weights, optimizer and schedule from a checkpoint's folder (any layout); returns its ``extra``.

        ``verify=False`` saves reading a checkpoint again that ``latest_checkpoint`` has just found good. The reference
        policy stays that of `model.path`.
        """
        extra = load_training_state(
            checkpoint,
            self.modules,
            self.optimizer.megatron,
            self.optimizer.scheduler,
            settings=self.optimizer.settings,
            verify=verify,
        )
        self.optimizer.adopt_configured_rates()
        return extra

    @property
    def num_updates(self) -> int:
        """Updates applied so far, those before a checkpoint included."""
        return int(self.optimizer.scheduler.num_steps)

    @property
    def _identity(self) -> str:
        """The policy's shape: one of another shape cannot take the weights."""
        sizes = self.architecture.numbers
        return (
            f"Qwen2.5-VL, {sizes.num_layers} layers of {sizes.hidden_size} ({sizes.num_heads} heads, "
            f"{sizes.num_kv_heads} of keys), {sizes.vocabulary_size} tokens, "
            f"vision {sizes.vision_depth} layers of {sizes.vision_hidden_size}"
        )

    def _policy_loss(self, sequences: Sequence[TrainingSequence]) -> PolicyLoss:
        limit = self.config.rollout.max_response_tokens
        return PolicyLoss(sequences, self.config.algorithm, self._topology, max_response_tokens=limit)

    def _step(self, sequences: Sequence[TrainingSequence], loss: Loss, *, apply: bool = True) -> dict[str, float]:
        num_tokens = sum(len(sequence.response) for sequence in sequences)
        assert num_tokens > 0, "an update needs response tokens"

        def micro_batch_loss(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Sums]:
            scores, real = self._scorer(batch, hidden, entropy=True), batch.num_tokens
            return loss(batch, scores.log_prob[:real], scores.entropy[:real])

        self.optimizer.zero_gradients()
        results = self._schedule.run(sequences, micro_batch_loss, forward_only=False)
        metrics = add_up(loss.names, [sums for _, sums in results], self._topology)
        if not apply:
            return metrics | {"gradient_norm": self.optimizer.gradient_norm()}
        outcome = self.optimizer.step(loss=metrics["loss"])
        return {
            **{name: value / num_tokens if name in TOKEN_MEANS else value for name, value in metrics.items()},
            "gradient_norm": outcome.gradient_norm,
            "learning_rate": outcome.learning_rate,
            "skipped_updates": float(outcome.skipped),
            "num_tokens": float(num_tokens),
            "num_sequences": float(len(sequences)),
        }

    def _keep_log_prob(self, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Sums]:
        log_prob = self._scorer(batch, hidden, entropy=False).log_prob[: batch.num_tokens]
        return log_prob.sum(), {"log_prob": log_prob}


class _PolicyWeights:
    """The policy's weights, exported anew in every iteration."""

    def __init__(self, actor: Actor):
        self._actor = actor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        actor = self._actor
        bucket_bytes = actor.config.rollout.sync_bucket_mib << 20
        return stream.export_weights(
            actor.modules, actor.architecture, actor._topology, bucket_bytes=bucket_bytes, copies=False
        )
