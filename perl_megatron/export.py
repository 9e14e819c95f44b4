"""The final policy of a run as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from perl_megatron.checkpoint.hf_files import save_checkpoint
from perl_megatron.errors import UserError
from perl_megatron.observability.json_lines import write_text
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.runtime.collective import gather_objects


def export_policy(
    folder: RunFolder, step: int, weights: Iterable[tuple[str, torch.Tensor]], model_path: Path, *, writes: bool
) -> None:
    """Write the policy after ``step`` steps, in place of an earlier one. Collective.

    Args:
        folder: of the run.
        step: steps done.
        weights: (published name, tensor) of all of them; a collective stream.
        model_path: the folder whose other files (processor, configuration) are the policy's too.
        writes: whether this rank writes.

    Raises UserError, on all ranks, where it cannot be written.
    """
    stream, fresh = iter(weights), folder.export.with_name("export.new")
    failure: str | None = None
    try:
        if writes:
            shutil.rmtree(fresh, ignore_errors=True)
        save_checkpoint(fresh, stream, model_path, write=writes)
        if writes:
            shutil.rmtree(folder.export, ignore_errors=True)  # of an earlier, shorter end of this run
            fresh.rename(folder.export)
            write_text(folder.exported_step, str(step))
    except (OSError, UserError) as error:
        failure = error.what if isinstance(error, UserError) else str(error)
        for _ in stream:  # the other ranks wait for this one until its end
            pass
    for text in gather_objects(failure):
        if text is not None:
            fix = "free some space and resume: the last checkpoint is complete"
            raise UserError(f"the policy could not be exported: {text}", where=str(folder.export), fix=fix)


def exported_step(folder: RunFolder) -> int | None:
    """That of the policy in the folder; it may be of an earlier, shorter end of this run."""
    step = folder.exported_step
    return int(step.read_text(encoding="utf-8")) if step.exists() and folder.export.exists() else None
