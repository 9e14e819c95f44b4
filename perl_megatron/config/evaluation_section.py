"""The section of the evaluation."""

from __future__ import annotations

from pydantic import Field

from perl_megatron.config.section import Section


class EvaluationConfig(Section):
    """Held-out evaluation, every question in several image orders."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations (0: only before and after training)."""
    num_orders: int = Field(default=4, ge=1)
    """Image orders of each question (fewer where a record has fewer); the original order is always one of them."""
    max_records: int | None = Field(default=None, ge=1)
    """Evaluate only the first so many records; None: all."""
