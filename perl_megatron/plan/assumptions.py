"""What a plan takes for granted: every number that is neither in the config nor in a data sheet, with its reason.

All of them are printed with the plan, and each can be set on the command line (``--assume name=value``). The shares of
peaks are what is commonly reported for such work; none was measured here on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from perl_megatron.errors import UserError

LEAST, MOST = 1e-6, 1e9
"""Numbers that a plan still makes sense of."""


def _assume(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """Numbers with a meaning; ``explain`` gives them for people."""

    # The work
    prompt_share: float = _assume(0.5, "mean prompt, as a share of data.max_prompt_tokens")
    response_share: float = _assume(0.5, "mean response, as a share of rollout.max_response_tokens")
    image_share: float = _assume(0.9, "share of a prompt's tokens that are image tokens")
    image_size_share: float = _assume(1.0, "mean image, as a share of data.max_pixels (without it: one a question)")
    kept_share: float = _assume(1.0, "share of the drawn questions that the filter keeps")

    # Memory of a process on a GPU
    device_reserve_gib: float = _assume(
        0.9,
        "GiB of a device that the driver keeps (ECC and its own): logs of others have torch say 79.1 to 79.3 GiB of an "
        "80 GB card, and 139.7 to 139.8 of an H200",
    )
    device_gib: float = _assume(2.0, "GiB for the CUDA context, cuBLAS, kernels, and NCCL's buffers")
    fragmentation: float = _assume(0.05, "share of the trainer's memory that its allocator loses between blocks")
    engine_fixed_gib: float = _assume(2.0, "GiB of vLLM's reserve for CUDA graphs and NCCL, which it keeps asleep")
    engine_batched_tokens: float = _assume(16384, "tokens of one of vLLM's steps (its default on GPUs from 70 GiB on)")

    # Memory of the machine
    host_gib: float = _assume(230.0, "GiB of a machine's memory for each of its devices (DGX A100 to H200: 2 TB for 8)")
    host_process_gib: float = _assume(6.0, "GiB of it for a rank: libraries, CUDA's and NCCL's buffers, decoded images")

    # Memory of a process on a CPU
    cpu_process_gib: float = _assume(0.38, "GiB for the interpreter and libraries (torch, transformers, megatron-core)")
    cpu_workspace_gib: float = _assume(0.05, "GiB for threads, communication and what the allocator keeps")

    # Memory traffic of the optimizer
    adam_bytes: float = _assume(
        36.0,
        "bytes a number: Adam reads gradient, weight and two moments, writes the last three; two norms read gradients",
    )
    weight_copy_bytes: float = _assume(6.0, "bytes a number more where a bfloat16 copy is made of the main weight")

    # Speed, as shares of the data sheet's peaks
    matmul_efficiency: float = _assume(0.45, "share of the peak that matrix products of the trainer and prefill reach")
    bandwidth_efficiency: float = _assume(0.65, "share of the memory bandwidth that decoding and the optimizer reach")
    link_efficiency: float = _assume(0.75, "share of the bandwidth within a node that collectives reach")
    network_efficiency: float = _assume(0.8, "share of the bandwidth between nodes that collectives reach")
    decode_overhead_ms: float = _assume(3.0, "milliseconds of scheduler and launches for a token of all sequences")
    all_reduce_us: float = _assume(15.0, "microseconds that a small all-reduce of a decoding step takes")
    host_copy_gb: float = _assume(10.0, "GB/s between device and (not pinned) host memory")
    pinned_copy_gb: float = _assume(25.0, "GB/s between device and pinned host memory, of an engine that sleeps")
    disk_gb: float = _assume(1.0, "GB/s to the folder of rollout.weight_transfer=disk, written and read once each")

    def explain(self) -> list[dict[str, Any]]:
        """Name, value and meaning of each, ready for JSON."""
        return [
            {"name": one.name, "value": getattr(self, one.name), "meaning": one.metadata["meaning"]}
            for one in fields(self)
        ]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Assumptions:
        """The defaults, but for ``name=value`` texts. UserError for an unknown name, or for a value that cannot be."""
        known = {one.name for one in fields(cls)}
        changed: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            is_share = name.endswith(("_share", "_efficiency"))
            is_rate = name.endswith("_gb")
            least = LEAST if is_share or is_rate else 0  # which something is divided by
            if name not in known or not least <= number < MOST or (is_share and number > 1):
                raise UserError(
                    f"{text!r} is not an assumption with its value",
                    where="--assume",
                    fix="write NAME=NUMBER (shares and efficiencies above 0, at most 1; GB/s above 0), with one of "
                    f"{', '.join(sorted(known))}",
                )
            changed[name] = number
        return replace(cls(), **changed)
