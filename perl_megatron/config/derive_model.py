"""Checks of how the policy is trained that do not depend on the number of processes; ``derive`` calls them."""

from __future__ import annotations

import importlib.util

from perl_megatron.config.schema import ModelConfig, OptimizerSection
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


def check_fp8(model: ModelConfig) -> None:
    """UserError where `model.fp8` is asked for without what it needs; whether there is CUDA shows at the start."""
    if model.fp8 == "none":
        return
    if model.dtype != "bfloat16":
        raise UserError(
            f"8-bit matrix products work on bfloat16 activations, and model.dtype is {model.dtype}",
            where=f"model.fp8 = {model.fp8}",
            fix="set model.dtype=bfloat16, or model.fp8=none",
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "8-bit matrix products are Transformer Engine's, which is not installed",
            where=f"model.fp8 = {model.fp8}",
            fix="pip install 'perl-megatron[gpu]' on a machine with CUDA, or set model.fp8=none",
        )


def fp8_alignment(model: ModelConfig) -> int:
    """The tokens of a matrix product are a multiple of it (megatron-core's ``fp8_utils.get_fp8_align_size``)."""
    if model.fp8 == "none":
        return 1
    return 32 if model.fp8_recipe == "mxfp8" else 16
