"""The policy objectives and the KL estimators of GRPO, token by token (PeRL, arXiv 2506.14907, Eq. 6; CISPO).

Shape suffix: ``T`` is the number of response tokens; a token belongs to one rollout, and each rollout's probabilities
are conditioned on its own view x_i. Sums over tokens are left to ``aggregation``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ±20 before they are exponentiated, as veRL does: a ratio stays finite, and a token beyond
the clamp has no gradient (exp overflows float32 at 88, and 0 · inf poisons the whole gradient)."""


@dataclass(frozen=True)
class TokenLoss:
    """The policy loss of each token, and which bound holds it.

    A token held by a bound has no gradient, but with CISPO, whose bounds only limit it.
    """

    loss: Tensor
    """[T], to be minimised: the negated objective."""
    ratio: Tensor
    """[T], detached: ρ = π_θ / π_old."""
    clipped_low: Tensor
    """bool [T]: A < 0 and ρ < 1 - clip_low; CISPO: A ≠ 0 and ρ < 1 - low."""
    clipped_high: Tensor
    """bool [T]: A > 0 and ρ > 1 + clip_high; CISPO: A ≠ 0 and ρ > 1 + high."""
    clipped_dual: Tensor
    """bool [T]: A < 0 and ρ > dual_clip; CISPO: never."""


def token_log_ratio(logprob: Tensor, logprob_old: Tensor) -> Tensor:
    """log ρ_t = logprob_t - logprob_old_t of each token by itself, [T]; only ``logprob`` is differentiated."""
    assert logprob.shape == logprob_old.shape, f"{tuple(logprob.shape)} against {tuple(logprob_old.shape)}"
    return logprob - logprob_old.detach()


def sequence_log_ratio(log_ratio: Tensor, total: Tensor, length: Tensor, *, mean: bool) -> Tensor:
    """One ratio for all tokens of a response: that of its probability, or, with ``mean``, its geometric mean.

        log ρ = Σ_t log ρ_t              PeRL Eq. 6
        log ρ = (1/R) Σ_t log ρ_t        GSPO (Zheng et al. 2025, arXiv 2507.18071)

    The gradient is spread over the tokens as in GSPO's token-wise form: each one carries the value of the whole and its
    own log-probability's gradient (times R for the product). With the weights 1 / (N · R) of the aggregation
    'sequence', a sum over tokens has the value and the gradient of the objective with one term for each response.

    Args:
        log_ratio: float [T], ``token_log_ratio``; differentiated.
        total: float [T], Σ_t log ρ_t of the token's whole response, of which this rank may hold a part.
        length: float or int [T], R of the token's response, at least 1.
        mean: the geometric mean.

    Returns:
        float [T], equal for all tokens of a response.
    """
    total = total.detach()
    own = log_ratio - log_ratio.detach()
    return total / length + own if mean else total + length * own


def clipped_objective(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> TokenLoss:
    """PPO's clipped surrogate (the inner term of PeRL Eq. 6) with dual clip (Ye et al. 2020, arXiv 1912.09729, Eq. 5).

        ρ_t = exp(log_ratio_t)
        J_t = min(ρ_t A_t, clip(ρ_t, 1 - clip_low, 1 + clip_high) A_t)
        J_t = max(J_t, dual_clip · A_t)    where A_t < 0

    Both lines together only bound the ratio on the side that the sign of A_t makes greedy, which is how it is computed:

        loss_t = -A_t · min(ρ_t, 1 + clip_high)                    where A_t ≥ 0
        loss_t = -A_t · min(max(ρ_t, 1 - clip_low), dual_clip)     where A_t < 0

    The paper has clip_low = clip_high = ε and no dual clip; the released code has dual_clip = 3.

    Args:
        log_ratio: float [T], of ``token_log_ratio`` or ``sequence_log_ratio``; the only argument that is
            differentiated.
        advantage: float [T], or anything that broadcasts to it.
        clip_low: ε of the lower bound, in (0, 1).
        clip_high: ε of the upper bound, > 0.
        dual_clip: c > 1; None turns it off.
    """
    advantage = advantage.detach().to(log_ratio).expand_as(log_ratio)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    negative = advantage < 0
    bounded = torch.where(
        negative,
        ratio.clamp(min=1 - clip_low, max=dual_clip),
        ratio.clamp(max=1 + clip_high),
    )
    ratio = ratio.detach()
    return TokenLoss(
        loss=-advantage * bounded,
        ratio=ratio,
        clipped_low=negative & (ratio < 1 - clip_low),
        clipped_high=(advantage > 0) & (ratio > 1 + clip_high),
        clipped_dual=negative & (ratio > dual_clip) if dual_clip is not None else torch.zeros_like(negative),
    )


def cispo_objective(
    logprob: Tensor, log_ratio: Tensor, advantage: Tensor, *, low: float | None, high: float
) -> TokenLoss:
    """CISPO: the log-probability weighed by the bounded ratio (MiniMax-M1, arXiv 2506.13585, Eq. 4 and 5).

        ρ̂_t = clip(ρ_t, 1 - low, 1 + high)
        J_t = sg(ρ̂_t) A_t log π_θ,t

    sg is the stop-gradient: ρ̂ is a constant weight, so a bound limits a token's gradient and never takes it away, which
    is the difference from ``clipped_objective``; where no bound holds, both have the gradient ρ_t A_t ∇log π_θ,t. The
    paper bounds ρ only from above (its low is so large that it never holds): ``low`` None. The value of the loss is no
    measure of progress: it is not that of the clipped form.

    Args:
        logprob: float [T], log π_θ; the only argument that is differentiated.
        log_ratio: float [T], of ``token_log_ratio``.
        advantage: float [T], or anything that broadcasts to it.
        low: ε of the lower bound, in (0, 1); None turns it off.
        high: ε of the upper bound, > 0.
    """
    advantage = advantage.detach().to(log_ratio).expand_as(log_ratio)
    ratio = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    lower = 0.0 if low is None else 1 - low
    matters = advantage != 0
    return TokenLoss(
        loss=-ratio.clamp(lower, 1 + high) * advantage * logprob,
        ratio=ratio,
        clipped_low=matters & (ratio < lower),
        clipped_high=matters & (ratio > 1 + high),
        clipped_dual=torch.zeros_like(matters),
    )


def kl_estimate(logprob: Tensor, logprob_ref: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates KL(π_θ ‖ π_ref) from tokens sampled by π_θ (Schulman 2020, "Approximating KL divergence").

    With r = π_ref / π_θ of the sampled token:

        k1 = -log r              unbiased, may be negative, high variance
        k2 = (log r)² / 2        biased, low variance
        k3 = (r - 1) - log r     unbiased, never negative, low variance; the released code's choice

    The names speak of the *value*. As a loss, its gradient is another matter (Tang & Munos, arXiv 2506.09477): only
    k2's gradient is, in expectation, that of KL(π_θ ‖ π_ref); k3's is that of KL(π_ref ‖ π_θ), and k1's is zero.

    Args:
        logprob: float [T], log π_θ; differentiated.
        logprob_ref: float [T], log π_ref.
        estimator: which one.

    Returns:
        float [T].
    """
    assert logprob.shape == logprob_ref.shape, f"{tuple(logprob.shape)} against {tuple(logprob_ref.shape)}"
    log_r = logprob_ref.detach() - logprob
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    assert estimator == "k3", f"unknown KL estimator {estimator!r}"
    log_r = log_r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_r.expm1() - log_r


def kl_penalty(
    logprob_old: np.ndarray, logprob_ref: np.ndarray, *, coefficient: float, estimator: Literal["k1", "k2", "k3"]
) -> float:
    """What is taken off a response's reward for its distance from the reference policy: r - β Σ_t KL_t.

    KL_t is ``kl_estimate`` of token t, of the policy that the ratio is taken against. With k1 the sum is an unbiased
    estimate of the divergence of the whole response, and the penalty has its gradient (Ouyang et al. 2022, arXiv
    2203.02155, Eq. 2; RLOO, arXiv 2402.14740, Eq. 3): as a reward k1 is the estimator to take, and may be negative. k3
    estimates the same value with another gradient.

    Args:
        logprob_old: float [R], log π_old.
        logprob_ref: float [R], log π_ref.
        coefficient: β.
        estimator: which one.

    Returns:
        β Σ_t KL_t in nats; 0 for an empty response.
    """
    old, ref = (torch.from_numpy(np.asarray(values, dtype=np.float64)) for values in (logprob_old, logprob_ref))
    return coefficient * float(kl_estimate(old, ref, estimator).sum())
