"""One process of `perl-megatron verify`."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.model.layer_specs import uses_transformer_engine
from perl_megatron.runtime import garbage, topology
from perl_megatron.runtime.collective import barrier, gather_objects, rank, world_size
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.verification.judge import judge
from perl_megatron.verification.layout import TIMEOUT_SECONDS, Layout
from perl_megatron.verification.layout_run import run_layout
from perl_megatron.verification.reference import Reference, compute_reference
from perl_megatron.verification.report import Report
from perl_megatron.verification.tiny import TinyImages, tiny_sequences, write_policy


@dataclass(frozen=True)
class Case:
    """A tiny policy on disk, its batch, and the reference."""

    policy: Path
    sequences: Sequence[TrainingSequence]
    images: TinyImages
    reference: Reference | None
    """Rank 0's; None elsewhere."""


def run(layout: Layout, json_file: Path | None) -> bool:
    """Verify one layout; rank 0 prints the table and writes the file. Returns on every rank whether all rows passed."""
    with topology.left_at_the_end():
        with quiet_libraries(), shared_folder() as folder:
            case = make_case(folder / "policy", layout)
            garbage.stay()
            report = verify_layout(layout, layout.other(world_size()), case, folder / "scratch")
        if report is not None:
            if json_file is not None:
                json_file.write_text(report.as_json(), encoding="utf-8")
            print(report.render())
        return all(gather_objects(report is None or report.passed))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without torch's and megatron-core's warnings about each other's outdated calls, which would bury the table."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|megatron)\.")
        yield


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder that all processes of this machine see; joins the process group, and leaves it at the end."""
    topology.initialize(ParallelConfig(), seed=0, timeout_seconds=TIMEOUT_SECONDS)
    topology.forget_layout()
    folder: Path | None = Path(tempfile.mkdtemp(prefix="perl-megatron-verify-")) if rank() == 0 else None
    folder = gather_objects(folder)[0]
    assert folder is not None
    try:
        yield folder
        barrier()
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def make_case(folder: Path, layout: Layout) -> Case:
    """Rank 0 writes the policy; then all share the work on its reference. Collective."""
    sequences, images, dtype = tiny_sequences(), TinyImages(), getattr(torch, layout.dtype)
    if rank() == 0:
        write_policy(folder, tied=layout.tied, num_layers=layout.num_layers, dtype=dtype)
    barrier()
    max_norm = layout.config(folder).optimizer.clip_gradient
    return Case(folder, sequences, images, compute_reference(folder, sequences, images, dtype, max_norm))


def verify_layout(layout: Layout, other: Layout, case: Case, scratch: Path) -> Report | None:
    """Run ``layout``, then go on in ``other``; the report on rank 0, None elsewhere. Collective."""
    findings = run_layout(layout, other, case.policy, case.sequences, case.images, scratch)
    dtype, optimizer = getattr(torch, layout.dtype), layout.config(case.policy).optimizer
    after = compute_reference(findings.export, case.sequences, case.images, dtype, optimizer.clip_gradient)
    if case.reference is None or after is None:  # all ranks but 0
        return None
    source = open_checkpoint(case.policy)
    name = str(other).split(",")[0]
    rows = judge(findings, (case.reference, after), source, optimizer, dtype=dtype, other=name)
    layers = "TransformerEngine" if uses_transformer_engine(dtype) else "torch"
    return Report(f"{layout}, layers of {layers}", layout.as_dict() | {"layers": layers}, rows)
