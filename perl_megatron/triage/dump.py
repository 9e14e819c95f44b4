"""Recorded rollouts: where they lie, how they are read, which of them are looked at. P prompt, R response tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perl_megatron.config.load import load_config
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.observability.json_lines import read_rows
from perl_megatron.observability.run_folder import RunFolder

RECORD_AGAIN = "record again with this version and run.record_rollouts=true"


@dataclass(frozen=True)
class RecordedRollout:
    """One row of a step's file."""

    name: str
    """In words, for messages and JSON."""
    step: int
    record: str
    view: int
    order: tuple[int, ...]
    image_keys: tuple[str, ...]
    """Content hash of each image of the view, in its order."""
    question: str
    response: str
    prompt_ids: np.ndarray
    """int64 [P]."""
    response_ids: np.ndarray
    """int64 [R]."""
    weight_version: int | None
    """Of the weights that sampled all of its tokens; None where they changed in the middle of the response."""
    logprob_rollout: np.ndarray | None
    """float64 [R], the engine's; NaN where it was not finite."""
    logprob_old: np.ndarray | None
    """float64 [R], the trainer's; None where it computed none."""

    @property
    def permuted(self) -> bool:
        """Whether the view shows the images in another order than the record."""
        return self.order != tuple(range(len(self.order)))


@dataclass(frozen=True)
class Dump:
    """The recorded rollouts of a run, or of one step of it."""

    run: RunFolder
    config: Config
    """As the run resolved it."""
    files: tuple[Path, ...]
    """One for each step, oldest first."""

    @property
    def images(self) -> Path:
        """The store of images by content hash."""
        return self.files[0].parent / "images"


def open_dump(path: Path) -> Dump:
    """Find a run's rollouts: ``path`` is the run folder, its `rollouts/`, or one `step-000001.jsonl` in there.

    Raises UserError where there is no such thing, no config of the run, or nothing recorded.
    """
    if path.is_file():
        root, files = path.absolute().parent.parent, [path]
    else:
        root = path.absolute().parent if path.absolute().name == "rollouts" else path
        files = sorted(RunFolder(root).rollouts.glob("step-*.jsonl"))
    run = RunFolder(root)
    if not path.exists() or not run.config.is_file():
        missing = "there is no such file or folder" if not path.exists() else f"{run.config} is missing"
        raise UserError(
            f"these are no rollouts of a run: {missing}",
            where=str(path),
            fix="give a run folder (runs/NAME), its rollouts folder, or one of its files rollouts/step-000001.jsonl",
        )
    if not files:
        raise UserError("this run has recorded no rollouts", where=str(run.rollouts), fix=RECORD_AGAIN)
    return Dump(run, load_config(run.config).config, tuple(files))


def read_rollouts(file: Path) -> list[RecordedRollout]:
    """All rollouts of a step's file that have a token.

    Raises UserError for rows that lack what triage needs, such as those of an older version.
    """
    rollouts = [_rollout(row, f"{file}:{number}") for number, row in enumerate(read_rows(file), start=1)]
    if not rollouts:
        raise UserError("the file holds no rollouts", where=str(file), fix=RECORD_AGAIN)
    return [rollout for rollout in rollouts if len(rollout.response_ids)]


def weight_version(row: dict[str, Any]) -> int | None:
    """The version of the weights that sampled a recorded rollout; None where there were several."""
    versions = {int(version) for version, _, _ in row["weight_versions"]}
    return versions.pop() if len(versions) == 1 else None


def newest_usable(dump: Dump, usable: Callable[[RecordedRollout], bool]) -> list[RecordedRollout]:
    """The usable rollouts of the newest step that has any; empty where there are none."""
    for file in reversed(dump.files):
        chosen = [rollout for rollout in read_rollouts(file) if usable(rollout)]
        if chosen:
            return chosen
    return []


def spread(rollouts: Sequence[RecordedRollout], limit: int) -> list[RecordedRollout]:
    """At most ``limit`` of them: first those that have the trainer's log-probabilities too, then the others.

    Among both, numbers of images, original and permuted views, and records take turns.
    """
    both = [rollout for rollout in rollouts if rollout.logprob_old is not None]
    others = [rollout for rollout in rollouts if rollout.logprob_old is None]
    return [*_in_turns(both), *_in_turns(others)][:limit]


def _in_turns(rollouts: Sequence[RecordedRollout]) -> list[RecordedRollout]:
    strata: dict[tuple[int, bool], dict[str, list[RecordedRollout]]] = defaultdict(lambda: defaultdict(list))
    for rollout in rollouts:
        strata[len(rollout.image_keys), rollout.permuted][rollout.record].append(rollout)
    return _take_turns([_take_turns(list(records.values())) for _, records in sorted(strata.items())])


def _take_turns(queues: Sequence[Sequence[RecordedRollout]]) -> list[RecordedRollout]:
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _rollout(row: dict[str, Any], where: str) -> RecordedRollout:
    needed = ("prompt_token_ids", "response_token_ids", "weight_versions", "logprob_rollout", "logprob_old")
    missing = [name for name in needed if name not in row]
    if missing:
        raise UserError(f"the rollout was recorded without {', '.join(missing)}", where=where, fix=RECORD_AGAIN)
    response = np.array(row["response_token_ids"], dtype=np.int64)
    rollout = RecordedRollout(
        name=f"step {row['step']}, record {row['record']}, view {row['view']}, line {where.rpartition(':')[2]}",
        step=int(row["step"]),
        record=str(row["record"]),
        view=int(row["view"]),
        order=tuple(row["order"]),
        image_keys=tuple(row["images"]),
        question=str(row["question"]),
        response=str(row["response"]),
        prompt_ids=np.array(row["prompt_token_ids"], dtype=np.int64),
        response_ids=response,
        weight_version=weight_version(row),
        logprob_rollout=_log_probs(row["logprob_rollout"]),
        logprob_old=_log_probs(row["logprob_old"]),
    )
    for party, values in (("logprob_rollout", rollout.logprob_rollout), ("logprob_old", rollout.logprob_old)):
        if values is not None and len(values) != len(response):
            raise UserError(f"{party} has {len(values)} numbers for {len(response)} response tokens", where=where)
    return rollout


def _log_probs(values: list[float | None] | None) -> np.ndarray | None:
    # By way of float32, which they were written as; None becomes NaN.
    return None if values is None else np.array(values, dtype=np.float32).astype(np.float64)
