"""TRL's own code, run without TRL's trainer: the function, or the lines, are cut out of the installed file.

``trl.trainer.grpo_trainer`` cannot be imported here (it needs pandas, datasets and accelerate, which are not
installed), so its source is read and the part that computes losses or advantages is executed as it stands.
"""

from __future__ import annotations

import ast
import textwrap
from collections import defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@cache
def source(file: str) -> str:
    """Of a file of the installed trl."""
    spec = find_spec("trl")
    assert spec is not None, "trl is a development dependency"
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")


@cache
def function(file: str, name: str) -> Any:
    """A function or method of the file; it sees torch and its own module's ``nanstd``, ``nanmin``, ``nanmax``."""
    names: dict[str, Any] = {"torch": torch, "Any": Any}
    if file != "trainer/utils.py":
        names |= {other: function("trainer/utils.py", other) for other in ("nanstd", "nanmin", "nanmax")}
    node = next(n for n in ast.walk(ast.parse(source(file))) if isinstance(n, ast.FunctionDef) and n.name == name)
    node.returns, node.decorator_list = None, []
    for argument in node.args.args:
        argument.annotation = None
    exec(compile(ast.Module([node], []), file, "exec"), names)
    return names[name]


def lines(file: str, first: str, last: str) -> str:
    """The lines of the file from the one that begins with ``first`` to the first one that begins with ``last``."""
    text = source(file).splitlines()
    start = next(n for n, line in enumerate(text) if line.strip().startswith(first))
    end = next(n for n, line in enumerate(text[start:], start) if line.strip().startswith(last))
    return textwrap.dedent("\n".join(text[start : end + 1]))


def advantages(rewards: np.ndarray, *, scale_rewards: str) -> np.ndarray:
    """GRPOTrainer's, of rewards float64 [groups, n]; it adds 1e-4 to the deviation."""
    program = lines("trainer/grpo_trainer.py", "mean_grouped_rewards = torch.nanmean", "is_std_zero =")
    names = {
        "torch": torch,
        "nanstd": function("trainer/utils.py", "nanstd"),
        "rewards": torch.from_numpy(rewards.ravel()),
        "num_generations": rewards.shape[1],
        "self": SimpleNamespace(scale_rewards=scale_rewards),
    }
    exec(program, names)
    return names["advantages"].numpy().reshape(rewards.shape)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """RLOOTrainer's advantages, of rewards float64 [groups, n], without normalisation."""
    program = lines("trainer/rloo_trainer.py", "scorable_counts =", "advantages = rewards - baselines")
    grouped = torch.from_numpy(rewards)
    names: dict[str, Any] = {"torch": torch, "grouped_rewards": grouped, "num_generations": rewards.shape[1]}
    names |= {"grouped_sum": torch.nansum(grouped, dim=1, keepdim=True), "rewards": grouped.reshape(-1)}
    exec(program + "\nelse:\n    raise AssertionError", names)
    return names["advantages"].numpy().reshape(rewards.shape)


class _OneProcess:
    """What accelerate does on one process: nothing."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


def loss(
    log_prob: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    *,
    ref: Tensor | None = None,
    loss_type: str = "grpo",
    level: str = "token",
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.0,
    delta: float | None = None,
    max_completion_length: int = 1,
) -> Tensor:
    """GRPOTrainer's loss of one batch: log-probabilities [B, T] with a mask, advantages [B]."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_prob, torch.zeros_like(log_prob), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=max_completion_length,
        _entropy_bonus_enabled=False,
        accelerator=_OneProcess(),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        **{"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask, "completion_mask": mask},
        **{"advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": ref},
        "num_items_in_batch": mask.sum(),
    }
    return function("trainer/grpo_trainer.py", "_compute_loss")(trainer, None, inputs)


@cache
def _overlong_class() -> Any:
    node = next(
        n
        for n in ast.walk(ast.parse(source("rewards/other_rewards.py")))
        if isinstance(n, ast.ClassDef) and n.name == "_SoftOverlongPunishment"
    )
    names: dict[str, Any] = {}
    exec(compile(ast.Module([node], []), "other_rewards.py", "exec"), names)
    return names["_SoftOverlongPunishment"]


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """``get_soft_overlong_punishment`` of ``trl.rewards``."""
    return _overlong_class()(max_tokens, buffer)([[0] * num_tokens])[0]
