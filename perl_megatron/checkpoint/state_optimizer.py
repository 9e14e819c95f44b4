"""Optimizer states go from torch's AdamW to the fused Adams of TransformerEngine and apex, and back.

megatron-core 0.16.1, optimizer/distrib_optimizer.py and optimizer/optimizer.py: torch counts steps in a float tensor of
each parameter, the fused ones in an int of each parameter group. A checkpoint has the count as its writer had it:
``DistributedOptimizer`` writes it into the groups, a float from torch; the others write torch's as 'common_step' and
leave the fused ones' in the groups. Nothing there turns one into the other, and the checkpoint's groups replace the
optimizer's own, with options that only the writer's class had. So FusedAdam stops at its first step, as its group has
no 'bias_correction', its kernel refuses a float, and it knows no state 'step'; torch's AdamW misses its own 'step'.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer


def fit_to_optimizer(loaded: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Bring the steps and the options of a loaded state into the form that ``optimizer`` reads. In place."""
    inner = optimizer.optimizer
    content = loaded.get("optimizer", loaded)  # FP32Optimizer has the state itself
    groups, states = content["param_groups"], content.get("state")
    for group in groups:
        for option, value in inner.defaults.items():
            group.setdefault(option, value)
    # A group's own count may be an old one: torch leaves it there when it goes on from a fused optimizer's state.
    common = None if states is None else states.pop("common_step", None)
    counts = [group["step"] for group in groups if "step" in group] if common is None else [common]
    if not counts:  # nothing has been updated yet
        return
    step = int(max(counts))
    if not isinstance(inner, torch.optim.Adam):  # torch's AdamW is one
        for group in groups:
            group["step"] = step
    elif states is not None:
        states["common_step"] = torch.tensor(float(step))
        for group in groups:
            group.pop("step", None)
