"""One Triton kernel compiled for one target, without a GPU; and what the target's tools say about the outcome."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perl_megatron.kernels import triton_kernels
from perl_megatron.kernels.triton_settings import COMBINE_TOKENS, GROUP, HALF, SINGLE, Launch
from tools.check_kernels import Compilation, Compiled

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "bias": "*fp32",
    "scale": "*fp32",
    "column": "*i64",
    "maximum": "*fp32",
    "total": "*fp32",
    "weighted": "*fp32",
    "target": "*fp32",
    "by_log_prob": "*fp32",
    "constant": "*fp32",
    "by_entropy": "*fp32",
}
ALIGNED = [["tt.divisibility", 16]]
"""Addresses and strides that are multiples of 16, as torch's are: what a launch finds out by itself."""
TYPES = {"bfloat16": "bf16", "float32": "fp32"}


def compile_kernel(case: Compilation) -> Compiled:
    """Raises what the compiler raises."""
    started = time.perf_counter()
    launch = _launch(case)
    constants = _constants(case, launch)
    kernel = getattr(triton_kernels, case.kernel)
    signature = {name: _type(name, case, launch, constants) for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name.startswith("stride")]
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: ALIGNED for name in aligned},
    )
    warps, stages = (launch.warps, launch.stages) if launch else (4, 1)
    target = _target(case.target)
    compiled: Any = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    registers, spilled = _usage_amd(compiled.asm["amdgcn"]) if target.backend == "hip" else _usage_nvidia(compiled)
    return Compiled(registers, spilled, compiled.metadata.shared, round(time.perf_counter() - started, 1))


def _target(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


def _launch(case: Compilation) -> Launch | None:
    if case.kernel == "combine_splits":
        return None
    settings = (SINGLE if case.dtype == "float32" else HALF)[case.target]
    return settings.forward if case.kernel == "add_up_splits" else settings.backward


def _constants(case: Compilation, launch: Launch | None) -> dict[str, Any]:
    if launch is None:
        return {"BLOCK_TOKENS": COMBINE_TOKENS, "ENTROPY": case.entropy}
    constants = {
        "H": case.hidden,
        "BLOCK_TOKENS": launch.tokens,
        "BLOCK_ROWS": launch.rows,
        "BLOCK_HIDDEN": launch.hidden,
        "ENTROPY": case.entropy,
        "DESCRIPTORS": launch.descriptors,
    }
    if case.kernel == "logits_gradient":
        return constants | {"GROUP": GROUP, "GRADIENT": case.gradient}
    return constants | {"HALVES": launch.halves}


def _type(name: str, case: Compilation, launch: Launch | None, constants: dict[str, Any]) -> str:
    """An argument's, in Triton's notation."""
    if name in constants:
        return "constexpr"
    if name in POINTERS:
        return POINTERS[name]
    kind = TYPES[case.dtype]
    if name == "result":
        return f"*{kind if case.gradient else 'fp32'}"
    if name in ("hidden", "weight"):
        assert launch is not None
        block = launch.tokens if name == "hidden" else launch.rows
        return f"tensordesc<{kind}[{block}, {launch.hidden}]>" if launch.descriptors else f"*{kind}"
    return "i32"


def _usage_nvidia(compiled: Any) -> tuple[int, int]:
    """(registers, bytes spilled or instructions that touch local memory), as ptxas and the machine code say."""
    ptx = compiled.asm["ptx"]
    arch = re.search(r"\.target (\w+)", ptx)
    assert arch is not None
    tool = NVIDIA_TOOLS / ("ptxas-blackwell" if arch[1].startswith("sm_10") else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [str(tool), "-v", "--gpu-name", arch[1], str(source), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        binary.write_bytes(compiled.asm["cubin"])
        command = [str(NVIDIA_TOOLS / "nvdisasm"), "-c", str(binary)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None, said
    assert spilled is not None, said
    local = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return int(registers[1]), int(spilled[1]) + int(spilled[2]) + local


def _usage_amd(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled vector and scalar registers), as the code object's metadata says."""

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"no {name} in the assembly"
        return int(found[1])

    return value("vgpr_count"), value("vgpr_spill_count") + value("sgpr_spill_count") + value(
        "private_segment_fixed_size"
    )
