"""Hidden states, an output weight and targets, and what plain torch makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.scores import ScoreOptions, TokenScores, VocabularyShard


@dataclass(frozen=True)
class Case:
    """T tokens, hidden size H, vocabulary V; with upstream gradients of log-probability and entropy."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    by_log_prob: Tensor
    by_entropy: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers, where ``dtype`` holds them."""
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


@dataclass(frozen=True)
class Outcome:
    """Of a forward and a backward pass."""

    log_prob: Tensor
    entropy: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor

    def errors(self, exact: Outcome) -> dict[str, float]:
        """Largest absolute errors of the values, relative errors (Frobenius) of the gradients."""

        def relative(found: Tensor, right: Tensor) -> float:
            return ((found.double() - right).norm() / right.norm()).item()

        return {
            "log_prob": (self.log_prob.double() - exact.log_prob).abs().max().item(),
            "entropy": (self.entropy.double() - exact.entropy).abs().max().item(),
            "hidden_gradient": relative(self.hidden_gradient, exact.hidden_gradient),
            "weight_gradient": relative(self.weight_gradient, exact.weight_gradient),
        }


def make_case(tokens: int = 7, hidden: int = 6, vocabulary: int = 23, dtype: torch.dtype = torch.float64) -> Case:
    """Logits of standard deviation 2; all inputs are bfloat16 numbers, so that every dtype holds the same."""
    generator = torch.Generator().manual_seed(tokens + 31 * hidden + 1009 * vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        hidden=normal(tokens, hidden).bfloat16().to(dtype),
        weight=(normal(vocabulary, hidden) * 2 / hidden**0.5).bfloat16().to(dtype),
        targets=torch.randint(0, vocabulary, (tokens,), generator=generator),
        by_log_prob=normal(tokens).float(),
        by_entropy=normal(tokens).float(),
    )


def plain(case: Case) -> Outcome:
    """Plain torch throughout in the case's dtype: product, log-softmax, autograd."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    log_p = (hidden @ weight.t()).log_softmax(1)
    log_prob = log_p.gather(1, case.targets[:, None])[:, 0]
    return _pull(case, hidden, weight, log_prob, -(log_p.exp() * log_p).sum(1))


def ours(
    case: Case, backend: str, options: ScoreOptions | None = None, shard: VocabularyShard | None = None
) -> tuple[Outcome, TokenScores]:
    """A backend's."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    scores = score_tokens(hidden, weight, case.targets, shard=shard, options=options, backend=backend)
    return _pull(case, hidden, weight, scores.log_prob, scores.entropy), scores


def _pull(case: Case, hidden: Tensor, weight: Tensor, log_prob: Tensor, entropy: Tensor) -> Outcome:
    loss = (case.by_log_prob * log_prob).sum() + (case.by_entropy * entropy).sum()
    loss.backward()
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in (hidden, weight)]
    return Outcome(log_prob.detach(), entropy.detach(), *gradients)
