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
from perl_megatron.runtime import topology
from perl_megatron.runtime.collective import barrier, gather_objects, rank, world_size
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.verification.judge import judge
from perl_megatron.verification.layout import TIMEOUT_SECONDS, Layout
from perl_megatron.verification.layout_run import run_layout
from perl_megatron.verification.reference import Reference, compute_reference, reference_log_probs
from perl_megatron.verification.report import Report
from perl_megatron.verification.tiny import TinyImages, tiny_sequences, write_policy


@dataclass(frozen=True)
class Case:
    """A tiny policy on disk, its batch, and (on rank 0, which judges) the reference."""

    policy: Path
    sequences: Sequence[TrainingSequence]
    images: TinyImages
    reference: Reference | None


def run(layout: Layout, json_file: Path | None) -> bool:
    """Verify one layout; rank 0 prints the table and writes the file. Returns on every rank whether all rows passed."""
    try:
        with quiet_libraries(), shared_folder() as folder:
            case = make_case(folder / "policy", layout)
            report = verify_layout(layout, layout.other(world_size()), case, folder / "scratch")
        if report is not None:
            if json_file is not None:
                json_file.write_text(report.as_json(), encoding="utf-8")
            print(report.render())
        return all(gather_objects(report is None or report.passed))
    finally:
        topology.shutdown()


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
    """Rank 0 writes the policy and computes the reference; the others wait. Collective."""
    sequences, images, reference = tiny_sequences(), TinyImages(), None
    if rank() == 0:
        dtype = getattr(torch, layout.dtype)
        write_policy(folder, tied=layout.tied, dtype=dtype)
        optimizer = layout.config(folder).optimizer
        reference = compute_reference(folder, sequences, images, dtype, optimizer)
    barrier()
    return Case(folder, sequences, images, reference)


def verify_layout(layout: Layout, other: Layout, case: Case, scratch: Path) -> Report | None:
    """Run ``layout``, then go on in ``other``; the report on rank 0, None elsewhere. Collective."""
    findings = run_layout(layout, other, case.policy, case.sequences, case.images, scratch)
    if case.reference is None:
        return None
    dtype = getattr(torch, layout.dtype)
    exact, rounded = (
        reference_log_probs(findings.export, case.sequences, case.images, each) for each in (torch.float64, dtype)
    )
    source = open_checkpoint(case.policy)
    name = str(other).split(",")[0]
    rows = judge(findings, case.reference, source, (exact, rounded), dtype=dtype, other=name)
    return Report(str(layout), layout.as_dict(), rows)
