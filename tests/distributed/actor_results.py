"""What actor_worker.py's ranks found, and what transformers finds in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from actor_case import Reference, gradient, make_config, make_encoder, with_log_probs
from actor_worker import TABLES
from launch_ranks import launch_ranks

from perl_megatron.data.processor import PromptEncoder
from perl_megatron.train.batch import TrainingSequence

WORKER = Path(__file__).with_name("actor_worker.py")


@dataclass(frozen=True)
class Found:
    """Of one layout."""

    arrays: Mapping[str, np.ndarray]
    report: Mapping[str, Any]

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """float64: the gradient that the step took, times the part's multiplier."""
        before, after = ({name: self.arrays[f"{when}/{name}"] for name in self._names} for when in ("before", "after"))
        return gradient(before, after)

    @property
    def _names(self) -> list[str]:
        return [name.removeprefix("before/") for name in self.arrays if name.startswith("before/")]


def run_worker(cases: Path, out: Path, table: str) -> dict[str, Found]:
    """Two ranks through every layout of the table."""
    launch_ranks(WORKER, cases, out, table, log=out / "ranks.log")
    return {
        name: Found(dict(np.load(out / f"{name}.npz")), json.loads((out / f"{name}.json").read_text()))
        for name in TABLES[table]
    }


@dataclass(frozen=True)
class Expected:
    """Of one case and its sequences, in float64."""

    log_probs: np.ndarray
    loss: float
    gradients: Mapping[str, np.ndarray]
    """By published name; zero where there is none."""


def expect(case: Path, make: Callable[[Path, PromptEncoder], Sequence[TrainingSequence]]) -> Expected:
    """The update that the worker makes with the sequences of ``make(case, encoder)``."""
    encoder = make_encoder(case)
    sequences = make(case, encoder)
    reference = Reference(case, encoder)
    log_probs = [reference.log_prob(sequence).detach().numpy() for sequence in sequences]
    loss = reference.policy_loss(with_log_probs(sequences, log_probs, log_probs, noise=0.5), make_config(case))
    loss.backward()
    gradients = {
        name: np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in reference.named()
    }
    return Expected(np.concatenate(log_probs), loss.item(), gradients)
