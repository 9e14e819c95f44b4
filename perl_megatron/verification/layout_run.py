"""What the processes of a layout do: train two steps through the actor, with a change of layout between them.

Everything here is collective, and gives every rank the same findings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from perl_megatron.checkpoint.hf_files import save_checkpoint
from perl_megatron.checkpoint.stream import export_tensors
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.runtime import topology
from perl_megatron.runtime.collective import barrier, rank
from perl_megatron.runtime.topology import Topology
from perl_megatron.train.actor import Actor
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.verification.layout import TIMEOUT_SECONDS, Layout
from perl_megatron.verification.reference import Named
from perl_megatron.verification.tiny import TinyImages


@dataclass(frozen=True)
class Findings:
    """What a layout computed. Weights in the policy's dtype, gradients in float32, on the CPU."""

    imported: Named
    """Exported as soon as they were imported."""
    log_probs: list[Tensor]
    """float32 [R] for each sequence."""
    gradients: tuple[Named, Named]
    """Of the first step and of the second, clipped."""
    gradient_norm: float
    """Of the first step, before clipping."""
    stepped: Named
    """After the first step."""
    export: Path
    """The Hugging Face folder written after the first step."""
    reimported_log_probs: list[Tensor]
    """The other layout's on that folder."""
    restored: Named
    """The other layout's weights from the checkpoint written after the first step."""
    continued: Named
    """Those after a second step."""


def run_layout(
    layout: Layout,
    other: Layout,
    policy: Path,
    sequences: Sequence[TrainingSequence],
    images: TinyImages,
    scratch: Path,
) -> Findings:
    """One step in ``layout``, then a change to ``other`` and another step. Collective; ``scratch`` is a new folder."""
    actor, place = _start(layout, policy, images)
    imported = _collect(actor.weights())
    log_probs = actor.log_probs(sequences)
    metrics = _update(actor, sequences, log_probs)
    gradients = _gradients(actor, place)
    stepped = _collect(actor.weights())
    checkpoint = actor.save(scratch / "checkpoints", 1, {})
    export = scratch / "export"
    save_checkpoint(export, actor.weights(), policy, write=rank() == 0)
    barrier()
    topology.forget_layout()

    other_actor, other_place = _start(other, policy, images)
    other_actor.restore(checkpoint)
    restored = _collect(other_actor.weights())
    _update(other_actor, sequences, other_actor.log_probs(sequences))
    other_gradients = _gradients(other_actor, other_place)
    continued = _collect(other_actor.weights())
    topology.forget_layout()

    reader, _ = _start(other, export, images)
    reimported_log_probs = reader.log_probs(sequences)
    topology.forget_layout()
    return Findings(
        imported=imported,
        log_probs=_tensors(log_probs),
        gradients=(gradients, other_gradients),
        gradient_norm=metrics["gradient_norm"],
        stepped=stepped,
        export=export,
        reimported_log_probs=_tensors(reimported_log_probs),
        restored=restored,
        continued=continued,
    )


def _start(layout: Layout, policy: Path, images: TinyImages) -> tuple[Actor, Topology]:
    config = layout.config(policy)
    place = topology.initialize(config.parallel, seed=0, timeout_seconds=TIMEOUT_SECONDS)
    return Actor(config, place, cast(PromptEncoder, images), total_steps=2), place


def _update(actor: Actor, sequences: Sequence[TrainingSequence], log_probs: Sequence[np.ndarray]) -> dict[str, float]:
    """A step of GRPO whose ratio is 1."""
    return actor.update([replace(each, logprob_old=old) for each, old in zip(sequences, log_probs, strict=True)])


def _gradients(actor: Actor, place: Topology) -> Named:
    """What the optimizer took from megatron-core's gradient buffers, whole, by published name.

    The distributed optimizer leaves each rank the sum of its own part of a buffer only; the parts are put together.
    """
    for chunk in actor.optimizer.chunks:
        for group in chunk.bucket_groups if chunk.ddp_config.use_distributed_optimizer else ():
            replicas = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                own = bucket.grad_data.chunk(replicas.size())[replicas.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=replicas)

    def main_gradient(parameter: Any) -> Tensor:
        return parameter.main_grad

    return _collect(export_tensors(actor.modules, actor.architecture, place, select=main_gradient))


def _collect(tensors: Iterable[tuple[str, Tensor]]) -> Named:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}


def _tensors(arrays: Iterable[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]
