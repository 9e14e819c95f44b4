"""The one place that chooses how the loss kernels run.

| backend | where | memory over inputs and gradients |
|---|---|---|
| ``reference`` | everywhere; the definition | all logits [T, V] and more |
| ``tiled`` | everywhere | two tiles, one of the weight and its gradient, a float32 gradient of the hidden states |
| ``triton`` | CUDA from sm_80 on, ROCm gfx942 | one tile of the logits' gradient, and gradients as ``tiled`` |

On a CPU with AVX-512 the inner loops of ``tiled`` are C++ (``native``), where that could be built.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from perl_megatron.errors import UserError
from perl_megatron.kernels import native, triton_settings
from perl_megatron.kernels.scores import ScoreOptions, TokenScores, VocabularyShard, check_inputs

Backend = Literal["reference", "tiled", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_MODULES: dict[Backend, str] = {"reference": "reference", "tiled": "tiled", "triton": "triton_fused"}


def why_not(backend: Backend, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None: it can."""
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        import triton

        return None if triton.knobs.runtime.interpret else "it needs a GPU, and there is none"
    try:
        triton_settings.target_of(device)
    except ValueError as error:
        return str(error)
    return None


def choose_backend(wanted: Backend | Literal["auto"] = "auto", device: torch.device | None = None) -> Backend:
    """``wanted``, or the fastest one on ``device`` (None: a GPU where there is one).

    Raises:
        UserError: ``wanted`` cannot run there.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "auto":
        return "triton" if device.type == "cuda" and why_not("triton", device) is None else "tiled"
    problem = why_not(wanted, device)
    if problem:
        raise UserError(
            f"the loss kernels of the backend '{wanted}' cannot run here: {problem}",
            where=f"model.loss_kernel={wanted}",
            fix="model.loss_kernel=auto takes the fastest one that runs",
        )
    return wanted


def describe(backend: Backend) -> str:
    """For people: the backend, and for ``tiled`` on a CPU what its inner loops are made of."""
    if backend != "tiled" or torch.cuda.is_available():
        return backend
    reason = native.why_not()
    return f"{backend}, inner loops in {'C++' if reason is None else f'torch: {reason}'}"


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    shard: VocabularyShard | None = None,
    options: ScoreOptions | None = None,
    backend: Backend | Literal["auto"] = "auto",
) -> TokenScores:
    """Log-probability, entropy and more of T tokens; see ``scores`` for what is computed.

    Args:
        hidden: [T, H], any floating dtype; equal on all ranks of the shard's group.
        weight: [rows ≥ shard.size, H], this rank's rows of the output weight, in the same dtype.
        targets: int64 [T], ids in the whole vocabulary or ``IGNORED``; equal on all ranks.
        shard: which rows these are; None: a whole vocabulary.
        options: temperature, banned tokens and what else to compute.
        backend: which one; 'auto' for the fastest.

    Raises:
        ValueError: shapes, dtypes or options do not go together. Each rank looks at its own: with a group, one that
            raises leaves the others waiting, as in any collective.
        UserError: the backend cannot run on the inputs' device.
    """
    options = options or ScoreOptions()
    shard = shard or VocabularyShard.whole(weight)
    check_inputs(hidden, weight, targets, shard, options)
    if backend == "auto" and hidden.dtype == torch.float64:
        backend = "tiled"  # which has float64 everywhere
    module = importlib.import_module(f"perl_megatron.kernels.{_MODULES[choose_backend(backend, hidden.device)]}")
    score: Callable[..., TokenScores] = module.score_tokens
    return score(hidden, weight, targets, shard, options)
