"""Keeps the books of a weight update: every weight exactly once."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

import torch

from perl_megatron.rollout.engine import SyncReport


class WeightLedger:
    """Passes a stream of weights on, counting them and checking their names."""

    def __init__(self, expected: Collection[str], *, dtype: torch.dtype):
        """``expected`` are the published Hugging Face names of all weights; ``dtype`` is the engine's."""
        self._expected = frozenset(expected)
        self._dtype = dtype
        self._started = time.perf_counter()
        self._came: set[str] = set()
        self._num_bytes = 0

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight in the engine's dtype; ValueError for one that is unknown or comes twice."""
        for name, tensor in weights:
            if name not in self._expected:
                raise ValueError(f"the model has no weight {name}")
            if name in self._came:
                raise ValueError(f"weight {name} came twice")
            self._came.add(name)
            cast = tensor.detach().to(self._dtype)
            self._num_bytes += cast.nbytes
            yield name, cast

    def check_complete(self) -> None:
        """ValueError lists the weights that did not come."""
        missing = sorted(self._expected - self._came)
        if missing:
            raise ValueError(f"{len(missing)} weights did not come: {', '.join(missing[:20])}")

    def close(self, version: int) -> SyncReport:
        """The report of a stream that has ended; ValueError lists the weights that did not come."""
        self.check_complete()
        return SyncReport(time.perf_counter() - self._started, self._num_bytes, len(self._came), version)
