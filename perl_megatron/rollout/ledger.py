"""Keeps the books of a weight update: every weight exactly once, and a digest of what came."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator

import torch

from perl_megatron.rollout.engine import SyncReport

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio's odd 64-bit integer, as a signed one


class WeightLedger:
    """Passes a stream of weights on, counting them and checking their names."""

    def __init__(self, expected: Collection[str], *, dtype: torch.dtype):
        """``expected`` are the published Hugging Face names of all weights; ``dtype`` is the engine's."""
        self._expected = frozenset(expected)
        self._dtype = dtype
        self._started = time.perf_counter()
        self._checksums: dict[str, str] = {}
        self._num_bytes = 0

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight in the engine's dtype; ValueError for one that is unknown or comes twice."""
        for name, tensor in weights:
            if name not in self._expected:
                raise ValueError(f"the model has no weight {name}")
            if name in self._checksums:
                raise ValueError(f"weight {name} came twice")
            cast = tensor.detach().to(self._dtype)
            self._checksums[name] = f"{tuple(cast.shape)}:{checksum(cast)}"
            self._num_bytes += cast.nbytes
            yield name, cast

    def close(self, version: int) -> SyncReport:
        """The report of a stream that has ended; ValueError lists the weights that did not come."""
        missing = sorted(self._expected - self._checksums.keys())
        if missing:
            raise ValueError(f"{len(missing)} weights did not come: {', '.join(missing[:20])}")
        return SyncReport(time.perf_counter() - self._started, self._num_bytes, len(self._checksums), version)

    def digest(self) -> str:
        """32 hexadecimal digits of all names, shapes and values that came, whatever their order."""
        text = "".join(f"{name}={self._checksums[name]};" for name in sorted(self._checksums))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_weights(names: Collection[str], get: Callable[[str], torch.Tensor], *, dtype: torch.dtype) -> str:
    """The digest that a ledger gives these weights; one at a time is in memory."""
    ledger = WeightLedger(names, dtype=dtype)
    for _ in ledger.watch((name, get(name)) for name in names):
        pass
    return ledger.digest()


def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit sum over the tensor's bits, each value weighted by its place; the same on every device.

    Integer arithmetic that wraps is exact and does not depend on the order of summation, and it runs where the tensor
    lies; a cryptographic hash of a large model on the host would take longer than the weight update itself.
    """
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        piece = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + piece.numel(), dtype=torch.int64, device=tensor.device)
        weight = place * _MULTIPLIER
        total += ((piece + place) * (weight ^ (weight >> 29))).sum()
    return int(total.item()) & ((1 << 64) - 1)
