"""AdamW on gradients that are given: what an optimizer step has to make of them, whatever they are.

Gradients are judged against transformers' elsewhere. So a step's tolerance is made of the rounding of AdamW alone, not
of what a low precision makes of small gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perl_megatron.config.schema import OptimizerSection


def replay(
    first: Mapping[str, Tensor],
    gradients: Sequence[Mapping[str, Tensor]],
    section: OptimizerSection,
    *,
    main: torch.dtype,
    weights: torch.dtype,
) -> list[dict[str, Tensor]]:
    """How far the weights are from ``first`` after each step, float64 by name.

    The step is taken in ``main``; what is seen of it are weights rounded to ``weights``. A weight without a gradient in
    a step stays as it is in that step.
    """
    masters = {name: weight.detach().to(main, copy=True) for name, weight in first.items()}
    adam = _adam(list(masters.values()), section)
    movements = []
    for step in gradients:
        for name, weight in masters.items():
            weight.grad = step[name].to(main) if name in step else None
        adam.step()
        movements.append({name: weight.to(weights).double() - first[name].double() for name, weight in masters.items()})
    return movements


def _adam(weights: Sequence[Tensor], section: OptimizerSection) -> torch.optim.AdamW:
    """Weight decay on all but biases and norms, as `optimizer.weight_decay` says."""
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [weight for weight in weights if weight.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (section.beta1, section.beta2)
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, eps=section.epsilon)
