"""The verdict: findings against the reference, with tolerances from what transformers itself loses by rounding.

    tolerance = ``MULTIPLE`` · error of transformers in the working dtype, against float64
              + ``FLOOR`` · last place of the largest value in the working dtype

``MULTIPLE``: two correct programs round at other places (tensor-parallel sums of partial products, other kernels, other
orders of summation), so one tensor's error may well be a few times the other program's; a mistake in a layout (a sum
too many or too few, a wrong slice, a stale copy) is off by the size of the value itself, orders of magnitude more.
``FLOOR``: where transformers happens to be exact, being a unit off in the last place is no mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from perl_megatron.checkpoint.compare import compare_checkpoints
from perl_megatron.verification.layout_run import Findings
from perl_megatron.verification.reference import Named, Reference
from perl_megatron.verification.report import Item, Row

MULTIPLE = 4.0
FLOOR = 1.0

PARTS = {
    "visual.patch_embed.": "vision patches",
    "visual.blocks.": "vision blocks",
    "visual.merger.": "merger",
    "model.embed_tokens.": "embedding",
    "model.layers.": "language layers",
    "model.norm.": "final norm",
    "lm_head.": "output layer",
}
"""Beginning of a published name → the part of the policy that it belongs to."""


def judge(
    findings: Findings,
    reference: Reference,
    source: Mapping[str, Tensor],
    exported: tuple[Sequence[Tensor], Sequence[Tensor]],
    *,
    dtype: torch.dtype,
    other: str,
) -> tuple[Row, ...]:
    """All rows.

    Args:
        findings: of the layout.
        reference: of the same two steps.
        source: the published weights that the layout imported.
        exported: the log-probabilities that transformers computes in float64 and in ``dtype`` with the weights that the
            layout exported after its first step.
        dtype: the working dtype.
        other: the name of the layout that was resharded to.
    """
    exact, rounded = reference.exact, reference.rounded
    stepped, continued = (_difference(weights, source) for weights in (findings.stepped, findings.continued))
    return (
        Row("log-probabilities", _sequences(findings.log_probs, exact.log_probs, rounded.log_probs, dtype)),
        Row("gradient norm", (_norm(findings.gradient_norm, reference, dtype),)),
        *_by_part("gradients", _tensors(findings.gradients, exact.gradients, rounded.gradients, dtype)),
        Row("optimizer step", _tensors(stepped, exact.updates[0], rounded.updates[0], dtype)),
        Row("export", _same_bits(findings.imported, source)),
        Row(f"reshard, export → {other}", _sequences(findings.reimported_log_probs, *exported, dtype)),
        Row(f"reshard, checkpoint → {other}", _same_bits(findings.restored, findings.stepped)),
        Row("optimizer step after reshard", _tensors(continued, exact.updates[1], rounded.updates[1], dtype)),
    )


def _sequences(
    ours: Sequence[Tensor], exact: Sequence[Tensor], rounded: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Item, ...]:
    """Largest absolute errors; the yardstick is the largest over all sequences, as each has but a few tokens."""

    def error(found: Tensor, right: Tensor) -> float:
        return (found.double() - right).abs().max().item() if found.shape == right.shape else math.inf

    largest = max(right.abs().max().item() for right in exact)
    yardstick = max(error(found, right) for found, right in zip(rounded, exact, strict=True))
    limit = _tolerance(yardstick, largest, dtype)
    pairs = enumerate(zip(ours, exact, strict=True))
    return tuple(Item(f"sequence {index}", error(found, right), limit) for index, (found, right) in pairs)


def _norm(ours: float, reference: Reference, dtype: torch.dtype) -> Item:
    right = reference.exact.gradient_norm
    limit = _tolerance(abs(reference.rounded.gradient_norm - right) / right, 1.0, dtype)
    return Item("all parameters", abs(ours - right) / right, limit)


def _tensors(ours: Named, exact: Named, rounded: Named, dtype: torch.dtype) -> tuple[Item, ...]:
    """Relative errors ‖ours - exact‖ / ‖exact‖ of every tensor; one that is missing or too many is infinitely off."""
    items = []
    for name, right in exact.items():
        assert right.norm() > 0, f"the reference of {name} is zero, which would prove nothing"
        limit = _tolerance(_relative_error(rounded[name], right), 1.0, dtype)
        items.append(Item(name, _relative_error(ours[name], right) if name in ours else math.inf, limit))
    return (*items, *(Item(name, math.inf, 0.0) for name in ours.keys() - exact.keys()))


def _relative_error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item() if found.shape == right.shape else math.inf


def _tolerance(yardstick: float, largest: float, dtype: torch.dtype) -> float:
    return MULTIPLE * yardstick + FLOOR * torch.finfo(dtype).eps * largest


def _same_bits(ours: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> tuple[Item, ...]:
    comparison = compare_checkpoints(ours, source)
    items = [
        # Bits can differ without a difference in value: 0 and -0.
        Item(each.name, 0.0 if each.equal else each.max_difference or math.inf, 0.0)
        for each in comparison.tensors
    ]
    orphans = (*comparison.only_in_first, *comparison.only_in_second)
    return (*items, *(Item(name, math.inf, 0.0) for name in orphans))


def _difference(weights: Named, before: Mapping[str, Tensor]) -> Named:
    return {name: weight.double() - before[name].double() for name, weight in weights.items() if name in before}


def _by_part(check: str, items: Iterable[Item]) -> list[Row]:
    """One row for each part that has items."""
    parts: dict[str, list[Item]] = {}
    for item in items:
        parts.setdefault(_part(item.name), []).append(item)
    in_order: Callable[[str], int] = list(PARTS.values()).index
    return [Row(f"{check}, {part}", tuple(parts[part])) for part in sorted(parts, key=in_order)]


def _part(name: str) -> str:
    return next(part for beginning, part in PARTS.items() if name.startswith(beginning))
