"""Two sets of published tensors, compared one tensor at a time: digests, orphans, largest differences."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from perl_megatron.checkpoint.qwen25_vl_table import EMBEDDING, OUTPUT_LAYER

_CHUNK = 1 << 22
"""Numbers that are compared at once: the float64 copies stay small, however large the tensor."""


@dataclass(frozen=True)
class TensorComparison:
    """One name in both checkpoints; each pair is (of the first, of the second)."""

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    digests: tuple[str, str]
    """BLAKE2b of dtype, shape and bytes."""
    max_difference: float
    """Largest absolute difference, in float64; NaN where a NaN or an infinity differs, infinite for other shapes."""

    @property
    def equal(self) -> bool:
        """Bit for bit, with the same dtype and shape."""
        return self.digests[0] == self.digests[1]


@dataclass(frozen=True)
class Comparison:
    """All names of both checkpoints."""

    tensors: tuple[TensorComparison, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    digests: tuple[str, str]
    """Of each side as a whole: BLAKE2b of its names and their digests. The same exactly where ``equal``."""

    @property
    def differing(self) -> list[TensorComparison]:
        """Tensors that are not equal, the largest difference first, NaN before all."""
        found = [each for each in self.tensors if not each.equal]
        return sorted(found, key=lambda each: (not math.isnan(each.max_difference), -each.max_difference, each.name))

    @property
    def equal(self) -> bool:
        """Same names, same bits."""
        return not (self.differing or self.only_in_first or self.only_in_second)

    def as_json(self) -> str:
        """Every row, as strict JSON: a difference that is not finite becomes text."""
        rows: list[dict[str, Any]] = []
        for each in self.tensors:
            finite = math.isfinite(each.max_difference)
            difference = each.max_difference if finite else str(each.max_difference)
            rows.append({**asdict(each), "max_difference": difference, "equal": each.equal})
        content = {
            "equal": self.equal,
            "digests": self.digests,
            "only_in_first": self.only_in_first,
            "only_in_second": self.only_in_second,
            "tensors": rows,
        }
        return json.dumps(content, indent=1, allow_nan=False)


def compare_checkpoints(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> Comparison:
    """Compare tensors of any shape and dtype by their names; one of each side is in memory at a time.

    An output layer that one side alone holds is no orphan where it is a copy of that side's embedding: checkpoints with
    tied embeddings come with and without it.
    """
    tensors = tuple(_compare(name, first[name], second[name]) for name in first if name in second)
    alone = (_orphans(first, second), _orphans(second, first))
    sides = [{each.name: each.digests[side] for each in tensors} | alone[side] for side in (0, 1)]
    return Comparison(tensors, tuple(alone[0]), tuple(alone[1]), (_whole(sides[0]), _whole(sides[1])))


def render(comparison: Comparison, *, most: int = 20) -> str:
    """What differs, worst first and ``most`` of each kind at most, each side's digest, and one line that sums up.

    Digests are cut to their first 12 digits; ``as_json`` has all of them.
    """
    differing = comparison.differing
    lines = [
        f"differs   {each.name}: {_sides(each)}, largest difference {each.max_difference:.3g}, "
        f"digests {_short(each.digests)}"
        for each in differing[:most]
    ]
    if len(differing) > most:
        lines.append(f"          and {len(differing) - most} more (--json lists all)")
    for label, orphans in (("first", comparison.only_in_first), ("second", comparison.only_in_second)):
        lines += [f"only in the {label}: {name}" for name in orphans[:most]]
        if len(orphans) > most:
            lines.append(f"          and {len(orphans) - most} more (--json lists all)")
    num_equal = len(comparison.tensors) - len(differing)
    verdict = "equal" if comparison.equal else "NOT equal"
    alone = len(comparison.only_in_first) + len(comparison.only_in_second)
    lines.append(f"digests of all tensors: {_short(comparison.digests)}")
    lines.append(f"{verdict}: {num_equal} tensors are the same bits, {len(differing)} differ, {alone} have no partner")
    return "\n".join(lines)


def _orphans(weights: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name → digest."""
    alone = {name: _digest(weights[name]) for name in sorted(weights) if name not in others}
    may_be_copy = OUTPUT_LAYER in alone and EMBEDDING in weights and EMBEDDING in others
    if may_be_copy and alone[OUTPUT_LAYER] == _digest(weights[EMBEDDING]):
        del alone[OUTPUT_LAYER]
    return alone


def _whole(digests: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.blake2b(lines.encode(), digest_size=32).hexdigest()


def _short(digests: tuple[str, str]) -> str:
    first, second = (digest[:12] for digest in digests)
    return first if digests[0] == digests[1] else f"{first} and {second}"


def _sides(each: TensorComparison) -> str:
    first, second = (f"{dtype} {list(shape)}" for dtype, shape in zip(each.dtypes, each.shapes, strict=True))
    return first if first == second else f"{first} and {second}"


def _compare(name: str, first: torch.Tensor, second: torch.Tensor) -> TensorComparison:
    digests = (_digest(first), _digest(second))
    if first.shape != second.shape:
        difference = math.inf
    else:
        difference = 0.0 if digests[0] == digests[1] else _max_difference(first, second)
    return TensorComparison(
        name,
        (tuple(first.shape), tuple(second.shape)),
        (_dtype(first), _dtype(second)),
        digests,
        difference,
    )


def _max_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    largest = 0.0
    for one, other in zip(first.flatten().split(_CHUNK), second.flatten().split(_CHUNK), strict=True):
        one, other = one.double(), other.double()  # noqa: PLW2901
        same = (one == other) | (one.isnan() & other.isnan())  # infinity - infinity would be NaN
        difference = torch.where(same, 0.0, (one - other).abs())
        if not difference.isfinite().all():
            return math.nan
        largest = max(largest, difference.max().item()) if len(difference) else largest
    return largest


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.blake2b(f"{_dtype(tensor)} {tuple(tensor.shape)}".encode(), digest_size=32)
    for part in tensor.contiguous().flatten().split(_CHUNK):
        digest.update(part.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
