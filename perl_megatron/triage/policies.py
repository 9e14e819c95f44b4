"""Which weights the rollouts should have been sampled with, and which others may have been in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from perl_megatron.checkpoint.manifest import list_checkpoints
from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.checkpoint.qwen25_vl_table import EMBEDDING, OUTPUT_LAYER
from perl_megatron.checkpoint.weights import Weights
from perl_megatron.errors import UserError
from perl_megatron.triage.dump import Dump

VISION, MERGER, EMBEDDINGS = "vision tower", "merger", "embedding"
LAYERS, OUTPUT = "language layers", "output layer"
GROUPS = (VISION, MERGER, EMBEDDINGS, LAYERS, OUTPUT)
"""Parts of a policy that may be stale by themselves; where embeddings are tied, the output layer is the embedding."""

STALE_PARTS: Mapping[str, tuple[str, ...]] = {
    **{group: (group,) for group in GROUPS},
    "vision tower and merger": (VISION, MERGER),
    "language model": (EMBEDDINGS, LAYERS, OUTPUT),
}
"""Parts that are looked at: what it is called → its groups."""


@dataclass(frozen=True, eq=False)
class Policy:
    """Weights on disk, under a name for people; two are the same only if they are one object."""

    name: str
    weights: Weights


Mix = Mapping[str, Policy]
"""Group → the policy that it is taken from."""


def group_of(name: str) -> str:
    """The group that a published tensor belongs to."""
    if name.startswith("visual.merger."):
        return MERGER
    if name.startswith("visual."):
        return VISION
    return {EMBEDDING: EMBEDDINGS, OUTPUT_LAYER: OUTPUT}.get(name, LAYERS)


def whole(policy: Policy) -> Mix:
    """All groups of one policy."""
    return dict.fromkeys(GROUPS, policy)


class Policies:
    """The policies of a run that are still on disk, and those that were named on the command line.

    Args:
        dump: its config names the policy of version 0, its run folder holds the checkpoints.
        given: `--policy`: taken for whatever version the rollouts have.
        others: `--other-policy`.
    """

    def __init__(self, dump: Dump, *, given: Path | None, others: Sequence[Path]):
        self._model = dump.config.model.path
        self._given = None if given is None else self._open(given, str(given))
        self._others = [self._open(path, str(path)) for path in others]
        self._paths = {0: self._model}
        for checkpoint in list_checkpoints(dump.run.checkpoints):
            self._paths[int(checkpoint.name.removeprefix("step-"))] = checkpoint
        self._of_version: dict[int, Policy] = {}

    @property
    def versions(self) -> list[int]:
        """Versions whose weights the run has left on disk, ascending."""
        return sorted(self._paths)

    def has(self, version: int | None) -> bool:
        """Whether the weights of a version are at hand; None is no version."""
        return version is not None and (self._given is not None or version in self._paths)

    def expected(self, version: int) -> Policy:
        """The weights of a version that is at hand."""
        return self._given or self._at(version)

    def of_run(self, version: int) -> Policy | None:
        """The run's own weights of a version, whatever `--policy` says; None where they are no longer on disk."""
        return self._at(version) if version in self._paths else None

    def candidates(self, expected: Policy) -> list[Policy]:
        """All others, the named ones first."""
        return [each for each in (*self._others, *map(self._at, self.versions)) if each is not expected]

    def _at(self, version: int) -> Policy:
        if version not in self._of_version:
            path = self._paths[version]
            self._of_version[version] = self._open(path, f"version {version} ({path})")
        return self._of_version[version]

    def _open(self, path: Path, name: str) -> Policy:
        return Policy(name, open_weights(path, config=self._model))


def check_given(versions: Iterable[int | None], given: Path | None) -> None:
    """UserError where one `--policy` is to stand for several versions."""
    distinct = sorted({version for version in versions if version is not None})
    if given is not None and len(distinct) > 1:
        raise UserError(
            f"the rollouts are of versions {', '.join(map(str, distinct))}, which are not all of one policy",
            where=f"--policy {given}",
            fix="give one step's file, rollouts/step-000001.jsonl",
        )


def changed_groups(expected: Policy, other: Policy, dtype: torch.dtype) -> set[str]:
    """Groups in which two policies differ, as numbers of ``dtype``."""
    changed: set[str] = set()
    for name in expected.weights:
        group = group_of(name)
        if group in changed or name not in other.weights:
            continue
        if not torch.equal(expected.weights[name].to(dtype), other.weights[name].to(dtype)):
            changed.add(group)
    if EMBEDDINGS in changed and OUTPUT_LAYER not in expected.weights:
        changed.add(OUTPUT)  # tied
    return changed


def stale_mixes(expected: Policy, other: Policy, dtype: torch.dtype) -> dict[str, Mix]:
    """What was stale, in words → the weights that would then have been in use; empty for the same numbers."""
    changed = changed_groups(expected, other, dtype)
    if not changed:
        return {}
    mixes: dict[str, Mix] = {f"all weights are those of {other.name}": whole(other)}
    seen = {frozenset(changed)}
    for part, groups in STALE_PARTS.items():
        stale = frozenset(changed.intersection(groups))
        if stale and stale not in seen:
            seen.add(stale)
            mixes[f"{part}: weights of {other.name}"] = {
                group: other if group in groups else expected for group in GROUPS
            }
    return mixes
