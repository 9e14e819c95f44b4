"""Every rollout of every step, as JSON lines that a person can read: `rollouts/step-000001.jsonl`.

The images that a rollout saw lie beside them once each, by content hash: `rollouts/images/KEY.png`. Token ids and
log-probabilities are there one by one, so that `perl-megatron triage` can compute them again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from perl_megatron.observability.json_lines import write_bytes, write_rows
from perl_megatron.types import Group, Rollout


class RolloutRecorder:
    """Writes one file a step (rank 0 only).

    Args:
        directory: `rollouts/` of the run.
        image_of: gives the resized image of a content hash, for the image store; None: no image store.
        resumed_step: files of later steps are removed.
    """

    def __init__(self, directory: Path, *, image_of: Callable[[str], Image] | None = None, resumed_step: int = 0):
        self._directory, self._image_of = directory, image_of
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > resumed_step:
                path.unlink()

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self._directory / f"step-{step:06d}.jsonl"

    def record(self, step: int, *, kept: Sequence[Group], dropped: Sequence[Group] = ()) -> None:
        """Write all rollouts of the step; those of kept groups carry advantages and the trainer's log-probabilities.

        OSError where that fails: then the step has no file, and no image is there in part.
        """
        rows = [
            row(step, group, rollout, kept=is_kept)
            for groups, is_kept in ((kept, True), (dropped, False))
            for group in groups
            for rollout in group.rollouts
        ]
        if self._image_of is not None:  # first: a step that is recorded has its images
            keys = {key for group in (*kept, *dropped) for prompt in group.prompts for key in prompt.image_keys}
            self._store_images(sorted(keys), self._image_of)
        write_rows(self.path(step), rows)

    def _store_images(self, keys: Sequence[str], image_of: Callable[[str], Image]) -> None:
        store = self._directory / "images"
        store.mkdir(exist_ok=True)
        for key in keys:
            path = store / f"{key}.png"
            if not path.exists():
                content = io.BytesIO()
                image_of(key).save(content, format="png")
                write_bytes(path, content.getvalue())


def row(step: int, group: Group, rollout: Rollout, *, kept: bool) -> dict[str, Any]:
    """What is recorded of one rollout."""
    view = group.views[rollout.view_index]
    return {
        "step": step,
        "record": view.record_id,
        "kind": view.kind,
        "kept": kept,
        "view": view.index,
        "order": list(view.order),
        "images": list(group.prompts[rollout.view_index].image_keys),
        "question": view.text,
        "answer": view.answer,
        "response": rollout.text,
        "num_tokens": len(rollout.token_ids),
        "prompt_token_ids": group.prompts[rollout.view_index].token_ids.tolist(),
        "response_token_ids": rollout.token_ids.tolist(),
        "finish_reason": rollout.finish_reason,
        "weight_versions": _spans(rollout.weight_versions),
        "reward": rollout.reward,
        "reward_parts": rollout.reward_parts,
        "kl_penalty": rollout.kl_penalty,
        "advantage": rollout.advantage,
        "logprob_rollout": _values(rollout.logprob_rollout),
        "logprob_old": _values(rollout.logprob_old),
        "logprob_rollout_mean": _mean(rollout.logprob_rollout),
        "logprob_old_mean": _mean(rollout.logprob_old),
        "logprob_ref_mean": _mean(rollout.logprob_ref),
        "logprob_gap_max": _largest_gap(rollout),
        "importance_mean": _mean(rollout.importance),
    }


def _spans(versions: np.ndarray) -> list[list[int]]:
    """[version, first token, end] of each run of tokens that the same weights sampled."""
    edges = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
    return [[int(versions[first]), first, end] for first, end in pairwise(edges) if end > first]


def _values(log_probs: np.ndarray | None) -> list[float | None] | None:
    """For JSON: nine digits, which give float32 numbers back bit for bit; None where a number is not finite."""
    if log_probs is None:
        return None
    return [float(f"{value:.9g}") if math.isfinite(value) else None for value in log_probs.tolist()]


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None or len(values) == 0 else float(np.mean(values, dtype=np.float64))


def _largest_gap(rollout: Rollout) -> float | None:
    if rollout.logprob_old is None or len(rollout.token_ids) == 0:
        return None
    return float(np.max(np.abs(rollout.logprob_rollout.astype(np.float64) - rollout.logprob_old)))
