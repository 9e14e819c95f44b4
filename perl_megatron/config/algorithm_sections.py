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
    skip_empty_steps: bool = False
    """A step whose groups were all dropped counts, and makes no update, instead of ending the run with the reasons: for
    runs that go on after the policy has nothing left to learn from most questions. The learning-rate schedule counts
    updates, so it stays behind by these steps."""
    oversample: float = Field(default=1.0, ge=1)
    """Questions drawn at once, as a multiple of those that are missing: more leave more surplus and need fewer
    refills."""
    carry_surplus: bool = False
    """Keep informative groups beyond rollout.questions_per_step for the next step, where they are off-policy, instead
    of dropping them."""
    max_carried_steps: int = Field(default=1, ge=1)
    """Drop carried groups that were sampled more than this many steps ago."""


class AlgorithmConfig(Section):
    """The GRPO objective (method: PeRL Eq. 4-6); `docs/method.md` has the equations and the published methods."""

    advantage_level: Literal["joint", "view", "two_level"] = "joint"
    """Which responses a reward is compared with: 'joint' those of all views (PeRL Eq. 5), 'view' those of its own view
    (plain GRPO in each view), 'two_level' both, added up (Share-GRPO)."""
    within_weight: float = Field(default=0.5, ge=0, le=1)
    """w of 'two_level': the advantage is w · (within the view) + (1 - w) · (across all views)."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from a reward: the mean of all responses that it is compared with, or of the others (RLOO)."""
    standardize: bool = True
    """Divide advantages by a standard deviation, + 1e-6; False is Dr.GRPO's form."""
    deviation: Literal["unbiased", "biased", "batch"] = "unbiased"
    """Which one: of the responses compared, by n - 1 ('unbiased', as in the released code) or by n ('biased'), or of
    all kept responses of the step ('batch', by n - 1)."""
    objective: Literal["clipped", "cispo"] = "clipped"
    """'clipped': PPO's surrogate, with clip_low, clip_high and dual_clip; 'cispo': log π_θ weighed by the bounded
    ratio, with cispo_low and cispo_high (MiniMax-M1), so that every token keeps a gradient."""
    loss_view: Literal["own", "original"] = "own"
    """The prompt that log-probabilities in the loss are conditioned on: the view that a response was sampled from
    (PeRL), or the original (NoisyRollout), which suits only answers that do not change with the image order."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """What the clip bounds hold: the ratio π_θ / π_old of each token, of the whole response (the paper's Eq. 6), or the
    response's geometric mean (GSPO, whose bounds are a few 1e-4). The latter two go with aggregation=sequence."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """'clipped': ε of the lower clip bound 1 - ε."""
    clip_high: float = Field(default=0.2, gt=0)
    """'clipped': ε of the upper clip bound 1 + ε."""
    dual_clip: float | None = Field(default=3.0, gt=1)
    """'clipped': c: for negative advantages the objective is bounded by c·A; None turns it off."""
    cispo_low: float | None = Field(default=None, gt=0, lt=1)
    """'cispo': ε of the lower bound 1 - ε of the ratio; None: there is none, as in MiniMax-M1."""
    cispo_high: float = Field(default=4.0, gt=0)
    """'cispo': ε of the upper bound 1 + ε of the ratio. Default: ScaleRL's bound of 5 (arXiv 2510.13786)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where β · KL goes: into the loss, token by token, or off the reward, summed over the response, before the
    advantage (then kl_estimator=k1 is the usual one)."""
    kl_coefficient: float = Field(default=0.01, ge=0)
    """β: weight of the KL divergence from the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence (Schulman): k1 = -log r, k2 = (log r)²/2, k3 = r - 1 - log r."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """'token': mean over all response tokens; 'sequence': mean over responses of their token means; 'constant': mean
    over responses of their token sums over rollout.max_response_tokens (Dr.GRPO: no bias by length)."""
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
