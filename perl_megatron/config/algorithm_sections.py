"""The sections of the algorithm: which groups are kept, and what is optimised on them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perl_megatron.config.section import Section


class FilterConfig(Section):
    """Which groups are kept for the update."""

    no_signal: bool = True
    """Drop groups whose rewards are all exactly equal."""
    min_accuracy: float = Field(default=0.0, ge=0, le=1)
    """Drop groups whose mean accuracy is lower."""
    max_accuracy: float = Field(default=1.0, ge=0, le=1)
    """Drop groups whose mean accuracy is higher."""
    max_truncated: float = Field(default=1.0, ge=0, le=1)
    """Drop groups where more than this share of responses was cut at the token limit."""
    max_unparsable: float = Field(default=1.0, ge=0, le=1)
    """Drop groups where more than this share of responses holds no answer that can be graded."""
    min_right_per_order: int = Field(default=0, ge=0)
    """Drop groups in which some image order was answered right less often than this."""
    min_wrong_per_order: int = Field(default=0, ge=0)
    """Drop groups in which some image order was answered wrong less often than this."""
    max_refills: int = Field(default=4, ge=0)
    """How often a step may draw again to replace dropped groups (0: train on what is left)."""
    oversample: float = Field(default=1.0, ge=1)
    """Questions drawn at once, as a multiple of those that are missing: more leave more surplus and need fewer
    refills."""
    carry_surplus: bool = False
    """Keep informative groups beyond rollout.questions_per_step for the next step, where they are off-policy, instead
    of dropping them."""
    max_carried_steps: int = Field(default=1, ge=1)
    """Drop carried groups that were sampled more than this many steps ago."""


class AlgorithmConfig(Section):
    """The GRPO objective (method: PeRL Eq. 4-6)."""

    standardize: bool = True
    """Divide advantages by the group's standard deviation (unbiased, + 1e-6); False is Dr.GRPO's form."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """What the clip bounds hold: the ratio π_θ / π_old of each token, of the whole response (the paper's Eq. 6), or the
    response's geometric mean (GSPO, whose bounds are a few 1e-4). The latter two go with aggregation=sequence."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """ε of the lower clip bound 1 - ε."""
    clip_high: float = Field(default=0.2, gt=0)
    """ε of the upper clip bound 1 + ε."""
    dual_clip: float | None = Field(default=3.0, gt=1)
    """c: for negative advantages the objective is bounded by c·A; None turns it off."""
    kl_coefficient: float = Field(default=0.01, ge=0)
    """β: weight of the KL divergence from the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence (Schulman): k1 = -log r, k2 = (log r)²/2, k3 = r - 1 - log r."""
    aggregation: Literal["token", "sequence"] = "token"
    """'token': mean over all response tokens; 'sequence': mean over responses of their token means."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer steps (mini-batches of questions) for each training step."""
    old_policy: Literal["trainer", "engine"] = "trainer"
    """Whose log-probabilities log π_old are: recomputed by the trainer before the step's first update, or those that
    the engine sampled with. The latter saves a forward pass; the clip bounds then act on the gap between engine and
    trainer too, and it is not measured."""
    importance_correction: Literal["off", "truncated", "masked"] = "off"
    """Weighs the policy loss by v = π_old / π_rollout, because the engine's probabilities are not the trainer's:
    'truncated' by min(v, importance_high), 'masked' by v between the bounds and by 0 outside. Only with
    old_policy=trainer."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether v is the ratio of each token or of the whole response, whose spread grows with its length."""
    importance_low: float = Field(default=0.5, ge=0, le=1)
    """'masked': smaller ratios are left out of the policy loss (default: as veRL, 1 / importance_high)."""
    importance_high: float = Field(default=2.0, ge=1)
    """Larger ratios are cut to this value ('truncated') or left out ('masked'). Default: veRL's; it recommends 1.5 to 5
    for tokens, 2 to 10 for whole responses."""
