"""The parts of a policy that can be trained at their own pace or not at all: vision tower, merger, language model.

A frozen part has no gradient buffer, no optimizer state and no float32 main weights. Where tower and merger are both
frozen, the tower runs without a backward pass; a frozen language model only passes gradients on to the images. A
pipeline stage of it has nothing to train at all: megatron-core gives such a rank empty parameter groups, so that it
takes part in every collective (gradient norm, checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from perl_megatron.config.schema import OptimizerSection

Part = Literal["vision", "merger", "language"]

_TOWER = "vision_model."
_MERGER = ("decoder.final_layernorm.", "projection.")
"""Below the vision model: the published `visual.merger.ln_q` is the final norm of the tower's transformer block."""


def part_of(name: str) -> Part:
    """The part that a parameter of the policy belongs to; wrappers may stand before its name."""
    _, tower, within = name.partition(_TOWER)
    if not tower:
        return "language"
    return "merger" if within.startswith(_MERGER) else "vision"


def multipliers(section: OptimizerSection) -> dict[Part, float]:
    """What each part's learning rate is multiplied with; 0 for a frozen part."""
    return {
        "vision": section.vision_multiplier,
        "merger": section.merger_multiplier,
        "language": section.language_multiplier,
    }


def trains_images(section: OptimizerSection) -> bool:
    """Whether the vision tower has a backward pass: not where it and the merger are frozen."""
    return section.vision_multiplier > 0 or section.merger_multiplier > 0


def freeze(modules: Sequence[torch.nn.Module], section: OptimizerSection) -> None:
    """Mark the parameters of frozen parts; before the modules are wrapped, which allocates the gradient buffers."""
    factors = multipliers(section)
    for module in modules:
        for name, parameter in module.named_parameters():
            if factors[part_of(name)] == 0:
                parameter.requires_grad_(False)


def group_overrides(config: OptimizerConfig, section: OptimizerSection) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's parameter groups: no weight decay on norms and biases, and the rates of each part.

    The schedule reads the bounds ``max_lr`` and ``min_lr`` of a group. ``lr_mult`` tells groups apart in a checkpoint
    (``param_group_identifier_keys``), where two groups that differ only in their bounds would be taken for one.
    """
    overrides = get_standard_config_overrides(config)
    for part, factor in multipliers(section).items():
        if factor not in (0, 1):
            key = ParamKey(with_name_predicate=ParamWithNamePredicate(name=part, fn=_belongs_to(part)))
            overrides[key] = {
                "max_lr": factor * section.learning_rate,
                "min_lr": factor * section.min_learning_rate,
                "lr_mult": factor,
            }
    return overrides


def _belongs_to(part: Part) -> Callable[[torch.nn.Parameter, str], bool]:
    return lambda parameter, name: part_of(name) == part
