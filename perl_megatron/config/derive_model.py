"""Checks of how the policy is trained that do not depend on the number of processes; ``derive`` calls them."""

from __future__ import annotations

import importlib.util

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.schema import ActorSection, ModelConfig, OptimizerSection, ParallelConfig
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


def check_psutil() -> None:
    """UserError where psutil is missing: megatron-core saves a checkpoint with it, and without hangs in silence."""
    if importlib.util.find_spec("psutil") is None:
        raise UserError("psutil is not installed, and saving a checkpoint hangs without it", fix="pip install psutil")


def check_sharing(actor: ActorSection, parallel: ParallelConfig) -> None:
    """UserError where prompts are to be shared and their rows are cut over context ranks."""
    if actor.sharing == "full" and parallel.context > 1:
        raise UserError(
            "responses that share a prompt lie in one row with it, and such rows are not cut over context ranks",
            where=f"actor.sharing = full, parallel.context = {parallel.context}",
            fix="set actor.sharing=vision, or parallel.context=1 (a shared prompt takes up a group's memory once)",
        )


def check_fp8(
    model: ModelConfig, parallel: ParallelConfig, architecture: ArchitectureNumbers, *, elsewhere: bool = False
) -> None:
    """UserError where `model.fp8` is asked for without what it needs; what the GPU can do shows at the start."""
    if model.fp8 == "none":
        return
    if model.dtype != "bfloat16":
        raise UserError(
            f"8-bit matrix products work on bfloat16 activations, and model.dtype is {model.dtype}",
            where=f"model.fp8 = {model.fp8}",
            fix="set model.dtype=bfloat16, or model.fp8=none",
        )
    _check_fp8_sizes(model, parallel, architecture)
    if not elsewhere and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "8-bit matrix products are Transformer Engine's, which is not installed",
            where=f"model.fp8 = {model.fp8}",
            fix="pip install 'perl-megatron[gpu]' on a machine with CUDA, or set model.fp8=none",
        )


def _check_fp8_sizes(model: ModelConfig, parallel: ParallelConfig, architecture: ArchitectureNumbers) -> None:
    """Each rank's part of each matrix of a language layer must be a multiple of the alignment, both ways."""
    alignment, tensor = fp8_alignment(model), parallel.tensor
    head_dim = architecture.hidden_size // architecture.num_heads
    sizes = {
        "hidden size": architecture.hidden_size,
        "feed-forward size": architecture.ffn_size // tensor,
        "queries": architecture.hidden_size // tensor,
        "queries, keys and values": (architecture.num_heads + 2 * architecture.num_kv_heads) * head_dim // tensor,
    }
    wrong = [f"{name} ({size})" for name, size in sizes.items() if size % alignment]
    if wrong:
        raise UserError(
            f"8-bit matrix products with the recipe '{model.fp8_recipe}' need multiples of {alignment}, and on a "
            f"tensor-parallel rank are of another size: {', '.join(wrong)}",
            where=f"model.fp8_recipe = {model.fp8_recipe}, parallel.tensor = {tensor}",
            fix="choose a smaller parallel.tensor, another model.fp8_recipe (only mxfp8 needs 32), or model.fp8=none",
        )


def fp8_alignment(model: ModelConfig) -> int:
    """The tokens of a matrix product are a multiple of it (megatron-core's ``fp8_utils.get_fp8_align_size``)."""
    if model.fp8 == "none":
        return 1
    return 32 if model.fp8_recipe == "mxfp8" else 16
