"""megatron-core's gradient buffers, optimizer and learning-rate schedule behind one small object.

``calculate_per_token_loss`` is set, which makes megatron-core *add* gradients over micro-batches and data-parallel
ranks instead of averaging them; and its division by the number of tokens is left out, because the losses of this
project carry weights that are already normalised by global counts (``algorithm/aggregation.py``). So a gradient is the
plain sum over all tokens of all ranks, and no split of the batch can change it.

Gradient reduction is not overlapped with the backward pass: every reduction starts when all micro-batches are done. So
a micro-batch without images, whose vision parameters get no gradient and fire no hook, needs no care.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.utils import get_model_config

from perl_megatron.config.schema import OptimizerSection
from perl_megatron.model.vision_shares import gradient_group
from perl_megatron.train import parts


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did; the same on every rank."""

    skipped: bool
    """Loss or gradient was not finite: weights, moments and learning rate are as they were."""
    gradient_norm: float
    """Global 2-norm before clipping."""
    learning_rate: float
    """The rate of this step, of parts whose multiplier is 1."""


class Optimizer:
    """AdamW over the DDP-wrapped chunks of this rank, with its schedule.

    Args:
        section: the configuration's `optimizer`.
        modules: this rank's model chunks, unwrapped, with their final weights on the device.
        total_steps: optimizer steps of the whole run, where the decay ends.
    """

    def __init__(self, section: OptimizerSection, modules: Sequence[torch.nn.Module], *, total_steps: int):
        parts.freeze(modules, section)
        for module in modules:
            mark_sharded_weights(module)
        self.chunks = [_wrap(module, section, is_first=index == 0) for index, module in enumerate(modules)]
        config = _megatron_config(section, modules[0])
        self.megatron = get_megatron_optimizer(config, self.chunks, parts.group_overrides(config, section))
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=section.learning_rate,
            min_lr=section.min_learning_rate,
            lr_warmup_steps=section.warmup_steps,
            lr_decay_steps=max(total_steps, section.warmup_steps + 1),
            lr_decay_style=section.schedule,
            start_wd=section.weight_decay,
            end_wd=section.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self._section = section

    def zero_gradients(self) -> None:
        """Clear the gradient buffers before the first micro-batch of a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def gradient_norm(self) -> float:
        """Global 2-norm of the reduced gradients, on every rank; not finite where one of them is not on any rank."""
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def step(self, *, loss: float) -> StepOutcome:
        """Clip and apply the reduced gradients, unless they or the global loss are not finite (then nothing changes).

        The k-th applied step (from 1) has the schedule's rate at k: the first is never 0, warm-up ends at its last
        step with the full rate, and the last step of a decay has the minimum.
        """
        gradient_norm = self.gradient_norm()
        if not (math.isfinite(gradient_norm) and math.isfinite(loss)):
            return StepOutcome(skipped=True, gradient_norm=gradient_norm, learning_rate=self.learning_rate)
        self.scheduler.step(1)
        self.megatron.step()
        return StepOutcome(skipped=False, gradient_norm=gradient_norm, learning_rate=self.learning_rate)

    @property
    def learning_rate(self) -> float:
        """The rate that is set now, of parts whose multiplier is 1: that of the last applied step."""
        return float(self.scheduler.get_lr({}))

    @property
    def settings(self) -> dict[str, float]:
        """The options that shape the optimizer's state, by name: a checkpoint is continued with the same."""
        return {f"optimizer.{part}_multiplier": factor for part, factor in parts.multipliers(self._section).items()}

    def adopt_configured_rates(self) -> None:
        """After a restore: the configuration, not the checkpoint, says how high the rates are."""
        for group in self.megatron.param_groups:
            group["max_lr"] = group["lr_mult"] * self.scheduler.max_lr
            group["min_lr"] = group["lr_mult"] * self.scheduler.min_lr
        self.scheduler.step(0)


def mark_sharded_weights(module: torch.nn.Module) -> None:
    """Tell the gradient norm which weights are shards (each counts) and which are replicas (one of them counts).

    megatron-core's layers do so only where they initialise their weights themselves (tensor_parallel/layers.py), which
    an imported policy leaves out; without it the norm, and with it clipping, is too small under tensor parallelism.
    """
    sharded = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
    for layer in module.modules():
        if isinstance(layer, sharded) and layer.weight is not None and gradient_group(layer.weight) is None:
            layer.weight.tensor_model_parallel = True  # type: ignore[assignment]


def _wrap(module: torch.nn.Module, section: OptimizerSection, *, is_first: bool) -> DistributedDataParallel:
    config = get_model_config(module)
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = _reduce_gradients
    chunk = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=section.distributed,
            # A check there raises on one rank only, and the others wait for it. ``Optimizer.step`` decides together.
            check_for_nan_in_grad=False,
        ),
        module,
        disable_bucketing=not is_first,
    )
    chunk.broadcast_params()
    return chunk


def _reduce_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """The schedules' hook at the end of a backward pass: add up over ranks; ``num_tokens`` must not divide."""
    del num_tokens
    _complete_partial_gradients(model)
    finalize_model_grads(model, None, **options)


def _complete_partial_gradients(model: Sequence[torch.nn.Module]) -> None:
    """Add up, in place, gradients of which each tensor-parallel rank has a part: those of a replicated vision tower.

    megatron-core does so for the parameters that it marks ``sequence_parallel`` itself, and only with that.
    """
    works = []
    for parameter in (parameter for chunk in model for parameter in chunk.parameters() if parameter.requires_grad):
        group = gradient_group(parameter)
        if group is not None:
            gradient = parameter.main_grad  # type: ignore[attr-defined]
            works.append(dist.all_reduce(gradient, group=group, async_op=True))
    for work in works:
        work.wait()


def _megatron_config(section: OptimizerSection, module: torch.nn.Module) -> OptimizerConfig:
    dtype = get_model_config(module).params_dtype
    return OptimizerConfig(
        optimizer="adam",
        lr=section.learning_rate,
        min_lr=section.min_learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.epsilon,
        clip_grad=section.clip_gradient,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=section.distributed,
    )
