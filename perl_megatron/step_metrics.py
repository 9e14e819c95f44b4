"""The numbers that one training step logs about what it drew (names: ``observability/metrics.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from perl_megatron.algorithm.importance import importance_ratio
from perl_megatron.algorithm.objective import kl_estimate
from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.drawn import Drawn
from perl_megatron.types import Group, Rollout, View


def rollout_metrics(drawn: Drawn) -> dict[str, float]:
    """How many groups had which decision; rewards and lengths over all groups sampled in the step, kept or not."""
    metrics = {
        "groups/kept": float(len(drawn.kept)),
        "groups/carried": float(len(drawn.carried)),
        "groups/dropped": float(sum(drawn.reasons.values())),
        "groups/refills": float(drawn.refills),
        **{f"groups/dropped_{reason}": float(count) for reason, count in drawn.reasons.items()},
    }
    penalties = [rollout.kl_penalty for group in drawn.kept for rollout in group.rollouts]
    if known := [penalty for penalty in penalties if penalty is not None]:
        metrics["reward/kl_penalty"] = float(np.mean(known))
    pairs = [(group, rollout) for group in drawn.groups for rollout in group.rollouts]
    return metrics | _sampled(pairs) if pairs else metrics  # none where enough groups were carried over


def _sampled(pairs: list[tuple[Group, Rollout]]) -> dict[str, float]:
    rewards = np.array([rollout.reward for _, rollout in pairs])
    lengths = np.array([len(rollout.token_ids) for _, rollout in pairs])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/accuracy": _mean_part(pairs, "accuracy"),
        "reward/format": _mean_part(pairs, "format"),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated": float(np.mean([rollout.finish_reason == "length" for _, rollout in pairs])),
        "response/unparsable": float(np.mean([not rollout.readable for _, rollout in pairs])),
    }
    for name, wanted in (("original", False), ("permuted", True)):
        chosen = [(group, rollout) for group, rollout in pairs if group.views[rollout.view_index].permuted is wanted]
        if chosen:
            metrics[f"reward/accuracy_{name}"] = _mean_part(chosen, "accuracy")
    return metrics | {f"reward/part/{name}": _mean_part(pairs, name) for name in pairs[0][1].reward_parts}


def staleness_metrics(groups: Sequence[Group], step: int) -> dict[str, float]:
    """How many steps of the policy ago the tokens of ``step`` (1-based) were sampled: 0 is on-policy."""
    if not groups:
        return {}
    versions = np.concatenate([rollout.weight_versions for group in groups for rollout in group.rollouts])
    age = step - 1 - versions
    return {"rollout/staleness_mean": float(age.mean()), "rollout/staleness_max": float(age.max())}


SHARES = {"truncated": "importance/truncated", "masked": "importance/masked"}
"""The metric that counts where a bound was met, for each `algorithm.importance_correction`."""


def mismatch_metrics(groups: Sequence[Group], algorithm: AlgorithmConfig) -> dict[str, float]:
    """How far the engine is from the trainer on all kept tokens, then by view and by number of images.

    Nothing where the trainer computed no log-probabilities of its own (`algorithm.old_policy` is the engine): the gap
    is not known then. With `algorithm.loss_view` = 'original' the trainer's are of another prompt than the engine's,
    but for views in the original order, so only these count.
    """
    pairs = [
        (group.views[rollout.view_index], rollout)
        for group in groups
        for rollout in group.rollouts
        if rollout.logprob_old is not None and len(rollout.token_ids)
        if algorithm.loss_view == "own" or not group.views[rollout.view_index].permuted
    ]
    metrics = {}
    for suffix, rollouts in _parts(pairs).items():
        numbers = _logprob_gap(rollouts) | _importance(rollouts, algorithm)
        metrics.update({name + suffix: value for name, value in numbers.items()})
    return metrics


def _parts(pairs: Sequence[tuple[View, Rollout]]) -> dict[str, list[Rollout]]:
    """The rollouts of all views, of original and permuted ones, and of those with so many images; no part is empty."""
    parts = {"": [rollout for _, rollout in pairs]}
    for name, wanted in (("_original", False), ("_permuted", True)):
        parts[name] = [rollout for view, rollout in pairs if view.permuted is wanted]
    for count in sorted({len(view.images) for view, _ in pairs}):
        parts[f"_{count}_images"] = [rollout for view, rollout in pairs if len(view.images) == count]
    return {name: rollouts for name, rollouts in parts.items() if rollouts}


def _logprob_gap(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Over all tokens of the rollouts."""
    sampled = np.concatenate([rollout.logprob_rollout for rollout in rollouts]).astype(np.float64)
    old = np.concatenate([_old(rollout) for rollout in rollouts]).astype(np.float64)
    gap = np.abs(sampled - old)
    # The tokens are the engine's samples, so these estimate KL(π_rollout ‖ π_old).
    k1, k3 = (
        kl_estimate(torch.from_numpy(sampled), torch.from_numpy(old), estimator).mean() for estimator in ("k1", "k3")
    )
    return {
        "logprob_gap/mean": float(gap.mean()),
        "logprob_gap/max": float(gap.max()),
        "logprob_gap/kl_k1": float(k1),
        "logprob_gap/kl_k3": float(k3),
    }


def _importance(rollouts: Sequence[Rollout], algorithm: AlgorithmConfig) -> dict[str, float]:
    """Over tokens, or over responses where a response has one weight."""
    if algorithm.importance_correction == "off":
        return {}
    counted = slice(1) if algorithm.importance_level == "sequence" else slice(None)
    ratios, weights = [], []
    for rollout in rollouts:
        assert rollout.importance is not None, "a kept rollout has no importance weights yet"
        ratio = importance_ratio(_old(rollout), rollout.logprob_rollout, algorithm.importance_level)
        ratios.append(ratio[counted])
        weights.append(rollout.importance[counted])
    weight = np.concatenate(weights)
    return {
        "importance/mean": float(weight.mean()),
        SHARES[algorithm.importance_correction]: float(np.mean(weight != np.concatenate(ratios))),
    }


def _old(rollout: Rollout) -> np.ndarray:
    assert rollout.logprob_old is not None
    return rollout.logprob_old


def _mean_part(pairs: list[tuple[Group, Rollout]], part: str) -> float:
    return float(np.mean([rollout.reward_parts[part] for _, rollout in pairs]))
