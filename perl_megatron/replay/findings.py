"""Where numbers stop being finite: in what the batch brought along, the weights, the forward or the backward pass.

Sequences are computed once together, as in the run, and each alone, so that one that spoils the sum is told from those
that are only beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perl_megatron.runtime.collective import gather_objects
from perl_megatron.train.actor import Actor
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.skipped_batch import PER_TOKEN, SkippedBatch

MAX_NAMES = 20
"""Modules and gradients that are named of each rank."""
MAX_TEXT = 60


@dataclass(frozen=True)
class Finding:
    """Something that is not finite."""

    what: str
    """'input', 'weight', 'module output', 'log-probability', 'sequence gradient' or 'parameter gradient'."""
    which: str
    detail: str


@dataclass(frozen=True)
class Findings:
    """All of them, in the order in which the numbers arise."""

    all: tuple[Finding, ...]
    loss: float
    """Of the whole batch, computed again."""
    gradient_norm: float

    @property
    def finite(self) -> bool:
        """Whether nothing was found."""
        return not self.all and math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    def as_dict(self) -> dict[str, Any]:
        """JSON; numbers that are not finite as texts."""
        numbers = {"loss": self.loss, "gradient_norm": self.gradient_norm}
        return {
            "finite": self.finite,
            **{name: value if math.isfinite(value) else repr(value) for name, value in numbers.items()},
            "findings": [asdict(finding) for finding in self.all],
        }


def examine(actor: Actor, batch: SkippedBatch, decode: Callable[[Sequence[int]], str]) -> Findings:
    """Compute the batch again. Collective: every rank gets the same findings."""
    names = [_describe(index, sequence, decode) for index, sequence in enumerate(batch.sequences)]
    found = [*_inputs(batch.sequences, names), *_weights(actor)]
    with _watched(actor.modules) as modules:
        log_probs = actor.log_probs(batch.sequences)
    found += _of_ranks("module output", modules)
    found += [
        Finding("log-probability", names[index], _count(values, "response tokens"))
        for index, values in enumerate(log_probs)
        if not np.isfinite(values).all()
    ]
    metrics = actor.gradients(batch.sequences, supervised=batch.supervised)
    parameters = _of_ranks("parameter gradient", _parameter_gradients(actor))
    for index, sequence in enumerate(batch.sequences):
        if len(sequence.response):
            alone = actor.gradients([sequence], supervised=batch.supervised)
            if not (math.isfinite(alone["loss"]) and math.isfinite(alone["gradient_norm"])):
                detail = f"alone: loss {alone['loss']:g}, gradient norm {alone['gradient_norm']:g}"
                found.append(Finding("sequence gradient", names[index], detail))
    return Findings((*found, *parameters), metrics["loss"], metrics["gradient_norm"])


def _describe(index: int, sequence: TrainingSequence, decode: Callable[[Sequence[int]], str]) -> str:
    text = decode(sequence.response.tolist())
    shown = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
    return f"sequence {index}: {len(sequence.prompt.image_keys)} images, {len(sequence.response)} tokens, {shown!r}"


def _inputs(sequences: Sequence[TrainingSequence], names: Sequence[str]) -> list[Finding]:
    found = []
    for name, sequence in zip(names, sequences, strict=True):
        if not math.isfinite(sequence.advantage):
            found.append(Finding("input", name, f"advantage {sequence.advantage}"))
        for field in PER_TOKEN:
            values = getattr(sequence, field)
            if values is not None and not np.isfinite(values).all():
                found.append(Finding("input", name, f"{field}: {_count(values, 'tokens')}"))
    return found


def _weights(actor: Actor) -> list[Finding]:
    """Under their published names, each once; with the rank where the replicas of the policy differ."""
    mine = {name: _count(tensor, "numbers") for name, tensor in actor.weights() if not torch.isfinite(tensor).all()}
    of_ranks = gather_objects(mine)
    found: dict[str, Finding] = {}
    for number, names in enumerate(of_ranks):
        for name, detail in names.items():
            same = all(other.get(name) == detail for other in of_ranks)
            found.setdefault(name, Finding("weight", name, detail if same else f"rank {number}: {detail}"))
    return list(found.values())


@contextmanager
def _watched(modules: Sequence[torch.nn.Module]) -> Iterator[list[tuple[str, str]]]:
    """Notes the modules of this rank whose output is not finite, in the order of the forward pass, each once."""
    noted: list[tuple[str, str]] = []
    seen: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or name in seen:
                return
            if not torch.isfinite(tensor).all():
                seen.add(name)
                noted.append((name, _count(tensor.detach(), "numbers")))

        return hook

    named = [(name, module) for chunk in modules for name, module in chunk.named_modules() if name]
    handles = [module.register_forward_hook(watch(name)) for name, module in named]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def _parameter_gradients(actor: Actor) -> list[tuple[str, str]]:
    """Of this rank's parts of the weights, with the gradients in their buffers."""
    found = []
    for chunk in actor.modules:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not torch.isfinite(gradient).all():
                found.append((name, _count(gradient, "numbers")))
    return found


def _of_ranks(what: str, mine: Sequence[tuple[str, str]]) -> list[Finding]:
    """What the ranks found of their own, rank by rank, the first of each."""
    found = []
    for number, names in enumerate(gather_objects(list(mine[:MAX_NAMES]))):
        found += [Finding(what, name, f"rank {number}: {detail}") for name, detail in names]
    return found


def _count(values: np.ndarray | Tensor, what: str) -> str:
    tensor = torch.as_tensor(values)
    nans, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nans} NaN and {infinite} infinite of {tensor.numel()} {what}"
