"""How the Triton kernels are cut and launched on each target; needs no Triton.

Chosen so that they compile without spilled registers and within the target's shared memory (`make check-kernels`;
docs/kernels.md has the table). Which are fastest was not measured: there was no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perl_megatron.kernels.tiles import TileShape

ROWS_OF_SPLIT = 4096
"""Vocabulary rows that one program of the forward pass goes over: fixed, so that a token's sums are added up in the
same order whatever else is in its batch."""
TILE = TileShape(tokens=4096, rows=4096)
"""Of the logits' gradient: 32 MiB in 16 bits; large enough for its two products."""
GROUP = 8
COMBINE_TOKENS = 128


@dataclass(frozen=True)
class Launch:
    """Of a kernel with a matrix product."""

    tokens: int
    rows: int
    hidden: int
    """A block of the product is tokens × rows, summed over ``hidden`` at a time."""
    warps: int
    stages: int
    """How many blocks of operands are loaded ahead."""
    halves: bool = False
    """Forward: a block is added up in two halves, which needs fewer registers."""
    descriptors: bool = False
    """Operands come by tensor descriptors, from sm_90 on."""


@dataclass(frozen=True)
class Settings:
    """Of one target and one size of numbers."""

    forward: Launch
    backward: Launch


def _both(launch: Launch) -> Settings:
    return Settings(launch, launch)


HALF = {
    "sm_80": _both(Launch(128, 128, 64, warps=8, stages=3)),
    "sm_90": _both(Launch(128, 256, 64, warps=8, stages=3, halves=True, descriptors=True)),
    "sm_100": Settings(
        forward=Launch(128, 256, 64, warps=8, stages=3, halves=True, descriptors=True),
        backward=Launch(128, 128, 64, warps=8, stages=3, descriptors=True),
    ),
    "gfx942": Settings(
        forward=Launch(128, 64, 64, warps=8, stages=2),
        backward=Launch(128, 128, 64, warps=8, stages=2),
    ),
}
"""Target → settings for 16-bit numbers, which the tensor cores multiply."""
SINGLE = {
    "sm_80": _both(Launch(64, 64, 32, warps=8, stages=2)),
    "sm_90": _both(Launch(64, 64, 32, warps=8, stages=2)),
    "sm_100": _both(Launch(64, 64, 16, warps=8, stages=2)),
    "gfx942": _both(Launch(64, 64, 32, warps=8, stages=2)),
}
"""Target → settings for float32, which is multiplied as such (no tensor core keeps its precision)."""
INTERPRETER = _both(Launch(32, 64, 32, warps=4, stages=1))


def target_of(device: torch.device) -> str:
    """The target whose settings suit a CUDA or ROCm device.

    Raises:
        ValueError: there is none.
    """
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if name != "gfx942":
            raise ValueError(f"the Triton loss kernels were made for gfx942, not for {name}")
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"the Triton loss kernels need compute capability 8.0 or higher, and this GPU has {major}.{minor}"
        )
    # 8.6, 8.9 and 12.x have the smallest shared memory and no such copies of blocks: what fits 8.0's settings.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def settings_for(device: torch.device, dtype: torch.dtype) -> Settings:
    """For a device; the interpreter's on a CPU. ValueError as ``target_of``, and for float64 on a GPU."""
    if device.type == "cpu":
        return INTERPRETER
    if dtype == torch.float64:
        raise ValueError("the Triton loss kernels compute in float32; for float64 take model.loss_kernel=tiled")
    return (SINGLE if dtype == torch.float32 else HALF)[target_of(device)]
