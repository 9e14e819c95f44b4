"""What transformers computes of an update in float64, and how far off a program in float32 may be.

Tolerances are those of `perl_megatron/verification/judge.py`, from what transformers itself loses in float32:

    tolerance = ``MULTIPLE`` · error of transformers in float32, against float64, on the same update
              + ``FLOOR`` · last place in float32 of the largest value

A single number, such as the loss, can be exact by luck, which would leave no tolerance. So its yardstick is a bound:
of the loss, what the log-probabilities it reads lose by their last place; of the gradient's norm, the whole error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from actor_case import GRADIENT_SCALE, Reference, make_config, make_encoder, norm, with_log_probs

from perl_megatron.config.schema import Config
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.verification.judge import FLOOR, MULTIPLE

EPS = float(np.finfo(np.float32).eps)
Named = Mapping[str, np.ndarray]
"""By published name."""


@dataclass(frozen=True)
class Update:
    """What one program computes; float64 numbers."""

    log_probs: np.ndarray
    """All responses' one after the other."""
    loss: float
    gradients: Named
    """As ``actor_case.gradient`` sees them in a step of the weights; zero where there is none."""


@dataclass(frozen=True)
class Expected:
    """Of one update."""

    exact: Update
    """transformers in float64."""
    rounded: Update
    """transformers in float32."""

    def check_log_probs(self, found: np.ndarray) -> None:
        """All responses' one after the other."""
        right = self.exact.log_probs
        yardstick = np.abs(self.rounded.log_probs - right).max()
        _check("log-probabilities", np.abs(found - right).max(), yardstick, largest=np.abs(right).max())

    def check_loss(self, found: float) -> None:
        right = self.exact.loss
        largest = max(abs(right), np.abs(self.exact.log_probs).max())
        _check("loss", abs(found - right), abs(self.rounded.loss - right), largest=largest)

    def check_step(self, steps: Named, gradient_norm: float, pace: Callable[[str], float] = lambda name: 1.0) -> None:
        """The weights moved by the gradient (``steps``) times each tensor's ``pace``, and not where that is zero.

        The norm is that of the gradients of those that moved.
        """
        exact, rounded = self.exact.gradients, self.rounded.gradients
        assert steps.keys() == exact.keys()
        moving = {name for name in exact if pace(name) and exact[name].any()}
        assert moving
        for name in steps:
            if name in moving:
                size = np.linalg.norm(exact[name])
                error = np.linalg.norm(steps[name] / pace(name) - exact[name]) / size
                _check(name, error, np.linalg.norm(rounded[name] - exact[name]) / size)
            else:
                assert not steps[name].any(), f"{name} moved"
        right = norm({name: exact[name] for name in moving})
        whole = norm({name: rounded[name] - exact[name] for name in moving})
        _check("gradient norm", abs(gradient_norm - right) / right, whole / right)


def _check(what: str, error: float, yardstick: float, *, largest: float = 1.0) -> None:
    limit = MULTIPLE * yardstick + FLOOR * EPS * largest
    assert error <= limit, f"{what}: off by {error:.1e}, of which {limit:.1e} is rounding"


def expect(case: Path, make: Callable[[Path, PromptEncoder], Sequence[TrainingSequence]]) -> Expected:
    """The update that actor_worker.py makes with the sequences of ``make(case, encoder)``.

    Its ratios start from the program's own log-probabilities, with noise.
    """
    encoder = make_encoder(case)
    sequences = make(case, encoder)

    def update(dtype: torch.dtype) -> Update:
        reference = Reference(case, encoder, dtype)
        with torch.no_grad():
            own = [reference.log_prob(sequence).numpy() for sequence in sequences]
        return _update(reference, with_log_probs(sequences, own, own, noise=0.5), make_config(case))

    return Expected(update(torch.float64), update(torch.float32))


def expect_of(case: Path, encoder: PromptEncoder, batch: Sequence[TrainingSequence], config: Config) -> Expected:
    """An update with a batch that has its log-probabilities; ``encoder`` is the one that made it."""
    references = (Reference(case, encoder, dtype) for dtype in (torch.float64, torch.float32))
    return Expected(*(_update(reference, batch, config) for reference in references))


def _update(reference: Reference, batch: Sequence[TrainingSequence], config: Config) -> Update:
    with torch.no_grad():
        log_probs = [reference.log_prob(sequence).double().numpy() for sequence in batch]
    loss = reference.policy_loss(batch, config)
    loss.backward()
    gradients = {name: _seen_gradient(parameter) for name, parameter in reference.named()}
    return Update(np.concatenate(log_probs), loss.item(), gradients)


def _seen_gradient(parameter: torch.nn.Parameter) -> np.ndarray:
    """In float32 as a step of the weight shows it, which rounds once more; in float64 as it is."""
    if parameter.grad is None:
        return np.zeros(parameter.shape)
    if parameter.dtype is torch.float64:
        return parameter.grad.numpy()
    weight = parameter.detach()
    after = weight + GRADIENT_SCALE * parameter.grad
    return ((after.double() - weight.double()) / GRADIENT_SCALE).numpy()
