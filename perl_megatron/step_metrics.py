"""The numbers that one training step logs about what it drew (names: ``observability/metrics.py``)."""

from __future__ import annotations

import numpy as np

from perl_megatron.collect import Drawn
from perl_megatron.types import Group, Rollout


def rollout_metrics(drawn: Drawn) -> dict[str, float]:
    """Rewards and accuracy over all sampled groups, dropped ones included; counts of kept and dropped groups."""
    pairs = [(group, rollout) for group in drawn.groups for rollout in group.rollouts]
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
        "groups/kept": float(len(drawn.kept)),
        "groups/dropped": float(sum(drawn.reasons.values())),
        "groups/refills": float(drawn.refills),
    }
    for name, wanted in (("original", False), ("permuted", True)):
        chosen = [(group, rollout) for group, rollout in pairs if group.views[rollout.view_index].permuted is wanted]
        if chosen:
            metrics[f"reward/accuracy_{name}"] = _mean_part(chosen, "accuracy")
    metrics.update({f"groups/dropped_{reason}": float(count) for reason, count in drawn.reasons.items()})
    return metrics


def logprob_gap(groups: list[Group]) -> dict[str, float]:
    """|logprob_rollout - logprob_old| over all kept tokens: how far the engine is from the trainer."""
    gaps = [
        np.abs(rollout.logprob_rollout.astype(np.float64) - rollout.logprob_old)
        for group in groups
        for rollout in group.rollouts
        if rollout.logprob_old is not None
    ]
    gap = np.concatenate(gaps)
    return {"logprob_gap/mean": float(gap.mean()), "logprob_gap/max": float(gap.max())}


def _mean_part(pairs: list[tuple[Group, Rollout]], part: str) -> float:
    return float(np.mean([rollout.reward_parts[part] for _, rollout in pairs]))
