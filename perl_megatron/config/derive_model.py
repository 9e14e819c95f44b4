"""Checks of how the policy is trained that do not depend on the number of processes; ``derive`` calls them."""

from __future__ import annotations

from perl_megatron.config.schema import OptimizerSection
from perl_megatron.errors import UserError

PART_FIELDS = ("vision_multiplier", "merger_multiplier", "language_multiplier")
"""The fields of ``OptimizerSection`` that set the pace of a part of the policy."""


def check_parts(optimizer: OptimizerSection) -> None:
    """UserError where every part of the policy is frozen."""
    if not any(getattr(optimizer, field) for field in PART_FIELDS):
        raise UserError(
            "vision tower, merger and language model are all frozen: there is nothing to train",
            where=", ".join(f"optimizer.{field} = 0" for field in PART_FIELDS),
            fix="set one of them above 0, or use `perl-megatron eval`, which trains nothing",
        )
