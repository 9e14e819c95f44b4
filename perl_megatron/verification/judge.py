"""The verdict: findings against the reference, with tolerances from what transformers itself loses by rounding.

    tolerance = ``MULTIPLE`` · error of transformers in the working dtype, against float64
              + ``FLOOR`` · last place of the largest value in the working dtype

``MULTIPLE``: two correct programs round at other places (tensor-parallel sums of partial products, other kernels, other
orders of summation), so one tensor's error may well be a few times the other program's; a mistake in a layout (a sum
too many or too few, a wrong slice, a stale copy) is off by the size of the value itself, orders of magnitude more.
``FLOOR``: where transformers happens to be exact, being a unit off in the last place is no mistake.

A relative tolerance ends at ``CEILING``, so that in no precision half a gradient passes, or half a step. A step is
judged by AdamW's own replay on the gradients that were found, which have rows of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from perl_megatron.checkpoint.compare import compare_checkpoints
from perl_megatron.config.schema import OptimizerSection
from perl_megatron.verification.layout_run import Findings
from perl_megatron.verification.reference import Named, Reference
from perl_megatron.verification.replay import replay
from perl_megatron.verification.report import Item, Row

MULTIPLE = 4.0
FLOOR = 1.0
CEILING = 0.4

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
    references: tuple[Reference, Reference],
    source: Mapping[str, Tensor],
    optimizer: OptimizerSection,
    *,
    dtype: torch.dtype,
    other: str,
) -> tuple[Row, ...]:
    """All rows.

    Args:
        findings: of the layout.
        references: transformers with the weights of ``source``, and with those that the layout exported after its step.
        source: the published weights that the layout imported.
        optimizer: the configuration's `optimizer`.
        dtype: the working dtype.
        other: the name of the layout that was resharded to.
    """
    before, after = references
    gradients, next_gradients = findings.gradients
    exact, rounded = (
        replay(dict(source), findings.gradients, optimizer, main=main, weights=weights)
        for main, weights in ((torch.float64, torch.float64), (torch.float32, dtype))
    )
    stepped, continued = (_difference(weights, source) for weights in (findings.stepped, findings.continued))
    return (
        Row("log-probabilities", _log_probs(findings.log_probs, before, dtype)),
        Row("gradient norm", (_norm(findings.gradient_norm, before, dtype),)),
        *_by_part("gradients", _gradients(gradients, before, dtype)),
        Row("optimizer step", _tensors(stepped, exact[0], rounded[0], dtype)),
        Row("export", _same_bits(findings.imported, source)),
        Row(f"reshard, export → {other}", _log_probs(findings.reimported_log_probs, after, dtype)),
        Row(f"reshard, checkpoint → {other}", _same_bits(findings.restored, findings.stepped)),
        Row("gradients after reshard", _gradients(next_gradients, after, dtype)),
        Row("optimizer step after reshard", _tensors(continued, exact[1], rounded[1], dtype)),
    )


def _gradients(ours: Named, reference: Reference, dtype: torch.dtype) -> tuple[Item, ...]:
    return _tensors(ours, reference.exact.gradients, reference.rounded.gradients, dtype)


def _log_probs(ours: Sequence[Tensor], reference: Reference, dtype: torch.dtype) -> tuple[Item, ...]:
    """Largest absolute errors; the yardstick is the largest over all sequences, as each has but a few tokens."""

    def error(found: Tensor, right: Tensor) -> float:
        return (found.double() - right).abs().max().item() if found.shape == right.shape else math.inf

    exact, rounded = reference.exact.log_probs, reference.rounded.log_probs
    largest = max(right.abs().max().item() for right in exact)
    yardstick = max(error(found, right) for found, right in zip(rounded, exact, strict=True))
    limit = _tolerance(yardstick, largest, dtype)
    pairs = enumerate(zip(ours, exact, strict=True))
    return tuple(Item(f"sequence {index}", error(found, right), limit) for index, (found, right) in pairs)


def _norm(ours: float, reference: Reference, dtype: torch.dtype) -> Item:
    """The yardstick is the whole gradient's error: that of a single number can be small by luck."""
    right, exact, rounded = reference.exact.gradient_norm, reference.exact.gradients, reference.rounded.gradients
    error = math.hypot(*((rounded[name] - exact[name]).norm().item() for name in exact))
    yardstick = error / math.hypot(*(gradient.norm().item() for gradient in exact.values()))
    return Item("all parameters", abs(ours - right) / right, _relative_tolerance(yardstick, dtype))


def _tensors(ours: Named, exact: Named, rounded: Named, dtype: torch.dtype) -> tuple[Item, ...]:
    """Relative errors ‖ours - exact‖ / ‖exact‖ of every tensor.

    One that is missing or too many is infinitely off, and so is one with which nothing can be compared.
    """
    items = []
    for name, right in exact.items():
        limit = _relative_tolerance(_relative_error(rounded[name], right), dtype)
        items.append(Item(name, _relative_error(ours[name], right) if name in ours else math.inf, limit))
    return (*items, *(Item(name, math.inf, 0.0) for name in ours.keys() - exact.keys()))


def _relative_error(found: Tensor, right: Tensor) -> float:
    comparable = found.shape == right.shape and right.norm() > 0
    return ((found.double() - right).norm() / right.norm()).item() if comparable else math.inf


def _relative_tolerance(yardstick: float, dtype: torch.dtype) -> float:
    return min(_tolerance(yardstick, 1.0, dtype), CEILING)


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
