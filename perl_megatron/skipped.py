"""Updates whose loss or gradient was not finite: their batches are kept for `perl-megatron replay`; many end a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

from perl_megatron.checkpoint.manifest import on_rank_zero
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.skipped_batch import save_batch

KEPT = 10
"""Batches of the newest skipped updates; they hold images."""


class SkippedUpdates:
    """Follows the updates of a run. Every rank has one and is given the same.

    Args:
        config: of the run.
        image_of: the resized image of a content hash.
        supervised: whether the loss is cross-entropy.
        note: tells a person something.
    """

    def __init__(
        self, config: Config, image_of: Callable[[str], Image], *, supervised: bool, note: Callable[[str], None]
    ):
        self._config, self._image_of = config, image_of
        self._supervised, self._note = supervised, note
        self._folder = RunFolder.of(config).skipped
        self._in_a_row: list[Path] = []
        self._last_step, self._updates = -1, 0

    def follow(self, step: int, sequences: Sequence[TrainingSequence], metrics: Mapping[str, float]) -> None:
        """After an update by weights that have made ``step`` steps. Collective.

        Raises UserError, on all ranks, after `optimizer.max_skipped_updates` skipped ones in a row.
        """
        self._updates = self._updates + 1 if step == self._last_step else 1
        self._last_step = step
        if not metrics["skipped_updates"]:
            self._in_a_row.clear()
            return
        name = f"step-{step + 1:06d}" + (f"-{self._updates}" if self._updates > 1 else "")
        path = self._folder / name
        on_rank_zero(lambda: self._keep(path, step, sequences, metrics))
        self._in_a_row.append(path)
        limit = self._config.optimizer.max_skipped_updates
        if len(self._in_a_row) >= limit:
            kept = self._in_a_row[-KEPT:]
            folders = "\n  ".join(map(str, kept))
            raise UserError(
                f"{limit} updates in a row had a loss or gradient that is not finite",
                where=f"optimizer.max_skipped_updates = {limit}; their batches:\n  {folders}",
                fix=f"`perl-megatron replay {kept[0]}` says which sequences and tensors it comes from; then "
                "resume with a lower learning rate, or from an older checkpoint",
            )

    def state(self) -> list[str]:
        """The names of the batches of the last updates, if those were skipped in a row; JSON."""
        return [path.name for path in self._in_a_row]

    def load_state(self, names: Sequence[str]) -> None:
        """Count on from what ``state`` gave."""
        self._in_a_row = [self._folder / name for name in names]

    def forget_after(self, step: int) -> None:
        """Where a run goes on from ``step``: removes the batches of later steps. Collective.

        The run makes those steps again, and their new checkpoints would pass for the old batches' weights.
        """
        on_rank_zero(lambda: self._forget(step), what="the folder of skipped updates")

    def _keep(self, path: Path, step: int, sequences: Sequence[TrainingSequence], metrics: Mapping[str, float]) -> None:
        what = f"loss {metrics['loss']:g}, gradient norm {metrics['gradient_norm']:g}"
        about = {"step": step, "update": self._updates, "supervised": self._supervised, "metrics": metrics}
        try:
            save_batch(path, sequences, self._pixels, **about)
            # By age: a run that was resumed from an older checkpoint may have newer batches of earlier steps.
            for old in sorted(self._folder.glob("step-*"), key=_age)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, UserError) as error:
            # Training can go on without it.
            reason = error.what if isinstance(error, UserError) else error
            self._note(f"step {step + 1}: skipped an update ({what}); its batch cannot be kept: {reason}")
            return
        self._note(f"step {step + 1}: skipped an update ({what}); its batch is in {path}")

    def _forget(self, step: int) -> None:
        later = [path for path in self._folder.glob("step-*") if int(path.name.split("-")[1]) > step]
        for path in later:
            shutil.rmtree(path, ignore_errors=True)
        if later:
            self._note(f"removed {len(later)} batches of skipped updates after step {step}: those steps are made anew")

    def _pixels(self, key: str) -> np.ndarray:
        return np.asarray(self._image_of(key))


def _age(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name
