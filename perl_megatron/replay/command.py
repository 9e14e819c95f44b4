"""`perl-megatron replay`: the batch of a skipped update, computed again by the trainer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perl_megatron.checkpoint.retention import step_of
from perl_megatron.checkpoint.state import newest_checkpoint
from perl_megatron.config.schema import Config
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.replay.findings import Findings, examine
from perl_megatron.runtime import platform, topology
from perl_megatron.runtime.collective import from_rank_zero
from perl_megatron.runtime.watchdog import Watchdog
from perl_megatron.train.actor import Actor
from perl_megatron.train.skipped_batch import SkippedBatch, load_batch

MAX_SHOWN = 6
"""Findings of a kind that are printed."""


class BatchEncoder(PromptEncoder):
    """The checkpoint's encoder, with the pixels that the batch was computed from."""

    def __init__(self, model_path: Path, pixels: Mapping[str, np.ndarray]):
        super().__init__(model_path, system_prompt="")
        self._kept = pixels

    def _pixels_of(self, key: str) -> np.ndarray:
        return self._kept[key]


def run(config: Config, folder: RunFolder, path: Path, *, checkpoint: Path | None, json_file: Path | None) -> bool:
    """Print the findings and write the file; whether all numbers are finite. Collective."""
    batch = load_batch(path)
    timeout = config.deadlines.collective_timeout
    place = topology.initialize(config.parallel, seed=config.run.seed, timeout_seconds=timeout)
    platform.set_threads()
    watchdog = Watchdog(config.deadlines.of_phases(), rank=place.rank, world_size=place.world_size)
    with topology.left_at_the_end(), watchdog:
        with watchdog.phase("start"):
            weights, remark = choose_weights(folder, batch, checkpoint)
            if weights is not None and (weights / "config.json").is_file():
                config = config.model_copy(update={"model": config.model.model_copy(update={"path": weights})})
                weights = None
            encoder = BatchEncoder(config.model.path, batch.pixels)
            actor = Actor(config, place, encoder, total_steps=1)
            if weights is not None:
                actor.restore(weights, verify=checkpoint is not None)  # the run's own has just been verified
        with watchdog.phase("update"):
            findings = examine(actor, batch, encoder.decode)
    if place.rank == 0:
        show(findings, batch, remark)
        if json_file is not None:
            content = {"batch": str(path), "weights": remark, **findings.as_dict()}
            json_file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return findings.finite


def choose_weights(folder: RunFolder, batch: SkippedBatch, given: Path | None) -> tuple[Path | None, str]:
    """The checkpoint to restore (None: `model.path`), and how its weights relate to those of the batch. Collective.

    What is damaged, or another run's, is passed over with a warning.
    """
    if given is not None:
        if not given.is_dir():
            raise UserError("the checkpoint does not exist", where=f"--checkpoint {given}", fix="give its folder")
        return given, str(given)
    found = newest_checkpoint(folder.checkpoints, up_to=batch.step, run=from_rank_zero(folder.read_identity))
    step = 0 if found is None else step_of(found)
    more = f" and {batch.update - 1} updates" if batch.update > 1 else ""
    exact = step == batch.step and not more
    about = (
        "the batch's own" if exact else f"the batch's had made {batch.step} steps{more}: they may give other numbers"
    )
    return found, f"weights after {step} steps; {about}"


def show(findings: Findings, batch: SkippedBatch, weights: str) -> None:
    """For a person."""
    console = Console(width=120)
    metrics = ", ".join(f"{name} {batch.metrics[name]:g}" for name in ("loss", "gradient_norm"))
    console.print(f"{len(batch.sequences)} sequences, skipped with {metrics}", highlight=False)
    console.print(f"weights: {weights}", highlight=False)
    again = f"loss {findings.loss}, gradient norm {findings.gradient_norm}"
    console.print(f"computed again: {again}", highlight=False)
    table = Table(title="not finite", show_header=True)
    for column in ("what", "which", "detail"):
        table.add_column(column, overflow="fold")
    for _, group in itertools.groupby(findings.all, key=lambda finding: finding.what):
        alike = list(group)
        for finding in alike[:MAX_SHOWN]:
            table.add_row(
                *map(Text, (finding.what, finding.which, finding.detail))
            )  # no markup: responses hold anything
        if len(alike) > MAX_SHOWN:
            table.add_row("", f"… and {len(alike) - MAX_SHOWN} more (--json has them)", "")
    console.print(table if findings.all else "all numbers are finite with these weights")
