"""Checkpoint folders: written under a temporary name, renamed when complete, checked by digest.

A folder that has its name is whole, because the rename comes last; ``manifest.json`` (size and SHA-256 digest of every
other file; processors have instructions for it) finds what happened to it later. All ranks need the same file system.
Every function with "Collective" in its description has to be called by all ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl_megatron.checkpoint.disk import file_inside
from perl_megatron.checkpoint.retention import (
    MANIFEST,
    TEMPORARY,
    Retention,
    list_checkpoints,
    step_of,
)
from perl_megatron.checkpoint.shared_folder import unseen
from perl_megatron.durable import sync_folder, sync_path
from perl_megatron.errors import UserError
from perl_megatron.runtime.collective import from_rank_zero, gather_objects, rank, shared_map, together

__all__ = ["MANIFEST", "PendingCheckpoint", "latest_checkpoint", "list_checkpoints", "verify_checkpoint"]

logger = logging.getLogger(__name__)

FORMAT = 2
_DIGESTS = {1: "blake2b", FORMAT: "sha256"}
"""Which digest the manifests of a format hold; FORMAT is written, all are read."""
CONTINUE_FROM_ANOTHER = "delete that checkpoint, continue from another"
_CHUNK_BYTES = 1 << 20


class StoppedError(Exception):
    """Reading a checkpoint through was given up, as nobody waits for the outcome any more."""


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is being written. Collective, all of it."""

    step: int
    target: Path
    """Its folder once it is complete."""
    temporary: Path
    """Where its files are written until then."""

    @classmethod
    def begin(cls, directory: Path, step: int) -> PendingCheckpoint:
        """Make an empty temporary folder; what an interrupted save left behind is deleted."""
        name = f"step-{step:08d}"
        pending = cls(step, directory / name, directory / f"{TEMPORARY}{name}")
        on_rank_zero(lambda: _make_empty(pending.temporary))
        return pending

    def write(self, name: str, text: str) -> None:
        """Add a text file."""
        on_rank_zero(lambda: _write(self.temporary / name, text))

    def commit(self, retention: Retention, written: Iterable[str] = ()) -> Path:
        """Digest all files, rename, and delete the checkpoints that are not kept.

        Over a network, a rank may see another's file late. So no rank's listing decides which file is whose: each
        digests what it says it has ``written`` (names relative to the folder), and rank 0 whatever else it finds there.
        Raises UserError, on all ranks, where a file cannot be read, or rank 0 does not get to see it; nothing has been
        published then.
        """
        owners: dict[str, int] = {}
        for owner, names in enumerate(gather_objects(sorted(written))):
            owners |= {name: owner for name in names if name not in owners}
        owners = dict.fromkeys(from_rank_zero(lambda: _names(self.temporary)), 0) | owners
        mine = [name for name, owner in owners.items() if owner == rank()]
        entries: dict[str, dict[str, Any]] = {}
        for part in gather_objects(together(lambda: {name: _entry(self.temporary / name) for name in mine})):
            entries |= part
        entries = dict(sorted(entries.items()))
        on_rank_zero(lambda: _require_all(self.temporary, entries, owners))
        self.write(MANIFEST, manifest_text(entries, step=self.step, facts=retention.facts()))
        on_rank_zero(lambda: _publish(self.temporary, self.target, retention))
        return self.target

    def discard(self) -> None:
        """After a failure: what was written only takes the space that the run needs. Not collective."""
        if rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)


def latest_checkpoint(
    directory: Path, *, up_to: int | None = None, refuse: Callable[[Path], None] = lambda checkpoint: None
) -> Path | None:
    """The newest checkpoint whose files are all as they were written; None where there is none. Collective.

    All ranks get the same one: rank 0 lists them. A damaged one, and one that ``refuse`` (called by rank 0 alone)
    raises a UserError for (it belongs to something else), is passed over with a warning that names the file. ``up_to``
    is the last step that counts; None: there is none.
    """
    for checkpoint in reversed(from_rank_zero(lambda: list_checkpoints(directory))):
        if up_to is not None and step_of(checkpoint) > up_to:
            continue
        try:
            verify_checkpoint(checkpoint)
            from_rank_zero(lambda: refuse(checkpoint))  # noqa: B023 - it is called at once
        except UserError as error:
            if rank() == 0:
                logger.warning("Passing over step %d, trying the checkpoint before:\n%s", step_of(checkpoint), error)
        else:
            return checkpoint
    return None


def verify_checkpoint(
    checkpoint: Path, *, fix: str = CONTINUE_FROM_ANOTHER, keep_on: Callable[[], bool] = lambda: True
) -> None:
    """Compare every file with the manifest, the ranks sharing the work. Collective.

    UserError names the file and advises ``fix``. Raises StoppedError soon after ``keep_on``, asked for every chunk of a
    file, says no.
    """
    algorithm, expected = from_rank_zero(lambda: _read_whole_manifest(checkpoint, fix))
    together(lambda: _require_sight(checkpoint, {name: size for name, (size, _) in expected.items()}, fix))

    def fault(name: str) -> str | None:
        try:
            same = _digest(checkpoint / name, algorithm, keep_on) == expected[name][1]
        except OSError as error:
            return _unreadable(error)
        return None if same else "a file of the checkpoint is not what was written"

    names = sorted(expected)
    for name, problem in zip(names, shared_map(fault, names), strict=True):
        if problem is not None:
            raise UserError(problem, where=str(checkpoint / name), fix=fix)


def on_rank_zero(action: Callable[[], None], *, what: str = "the checkpoint") -> None:
    """Run ``action`` on one rank; if it cannot write ``what``, every rank raises UserError, none waits. Collective."""
    failure: UserError | None = None
    if rank() == 0:
        try:
            action()
        except UserError as error:
            failure = error
        except OSError as error:
            failure = UserError(f"{what} could not be written: {type(error).__name__}: {error}", where="run.directory")
    for error_of_rank in gather_objects(failure):
        if error_of_rank is not None:
            raise error_of_rank


def _read_whole_manifest(checkpoint: Path, fix: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """As ``_read_manifest``; UserError also where a file is missing or has another size."""
    algorithm, expected = _read_manifest(checkpoint / MANIFEST, fix)
    for name, (expected_size, _) in sorted(expected.items()):
        file = checkpoint / name
        problem = None
        try:
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                problem = "a file of the checkpoint is missing"
            elif size != expected_size:
                problem = f"a file of the checkpoint has {size} bytes, and was written with {expected_size}"
        except OSError as error:
            problem = _unreadable(error)
        if problem is not None:
            raise UserError(problem, where=str(file), fix=fix)
    return algorithm, expected


def _unreadable(error: OSError) -> str:
    return f"a file of the checkpoint cannot be read: {error.strerror or error}"


def _require_sight(checkpoint: Path, sizes: Mapping[str, int], fix: str) -> None:
    """UserError where this rank does not get to see a file that rank 0 has seen: it may have to load it."""
    name = unseen(checkpoint, sizes) if rank() else None
    if name is not None:
        problem = f"rank {rank()} does not see a file of the checkpoint as rank 0 does"
        raise UserError(problem, where=str(checkpoint / name), fix=fix)


def _read_manifest(manifest: Path, fix: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """The kind of digest; size and digest of each file. UserError if it is missing, damaged, or of another format."""
    try:
        content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        version = content["format"]
        if version not in _DIGESTS:
            raise UserError(
                f"the checkpoint has format {version!r}; this version reads {', '.join(map(str, _DIGESTS))}",
                where=str(manifest),
            )
        algorithm = _DIGESTS[version]
        for name in content["files"]:
            file_inside(manifest.parent, name, named_by=manifest)
        return algorithm, {
            name: (int(entry["size"]), str(entry[algorithm])) for name, entry in content["files"].items()
        }
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's manifest cannot be read: {error!r}", where=str(manifest), fix=fix) from error


def _make_empty(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _entry(file: Path) -> dict[str, Any]:
    """``file_entry`` of a file that this rank has written."""
    try:
        return file_entry(file)
    except OSError as error:
        raise UserError(_unreadable(error), where=str(file)) from error


def _require_all(folder: Path, entries: Mapping[str, Mapping[str, Any]], owners: Mapping[str, int]) -> None:
    """UserError where this rank does not get to see a file that another one has written."""
    name = unseen(folder, {name: entry["size"] for name, entry in entries.items()})
    if name is not None:
        raise UserError(
            f"rank 0 does not see {name}, which rank {owners[name]} has written",
            where="run.directory",
            fix="put it on a file system that all nodes share",
        )


def _publish(temporary: Path, target: Path, retention: Retention) -> None:
    sync_folder(temporary)  # not all that wrote into it wait for the disk
    replaced = target.with_name(f"{TEMPORARY}replaced-{target.name}")
    if target.exists() and not retention.is_own(target):
        replaced = _free_name(target.with_name(f"other-run-{target.name}"))  # somebody may want it back
        logger.warning("%s is not known to be this run's, and is now called %s", target, replaced.name)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    sync_path(target.parent)
    if replaced.exists() and replaced.name.startswith(TEMPORARY):
        shutil.rmtree(replaced)
    retention.delete_superfluous(target)


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}.{number + 1}")
    return free


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def manifest_text(
    entries: dict[str, dict[str, Any]], *, step: int | None = None, facts: Mapping[str, Any] | None = None
) -> str:
    """The manifest of files with these names and ``file_entry`` each; without a step it is no training checkpoint's.

    ``facts`` are what else it says (``Retention.facts``).
    """
    return json.dumps({"format": FORMAT, "step": step, **(facts or {}), "files": entries}, indent=1)


def file_entry(file: Path) -> dict[str, Any]:
    """Size and digest."""
    return {"size": file.stat().st_size, "sha256": _digest(file, "sha256", lambda: True)}


def quick_entry(file: Path) -> dict[str, Any]:
    """Size and time of the last change; for files that no manifest will list, as reading them again would take long."""
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _digest(path: Path, algorithm: str, keep_on: Callable[[], bool]) -> str:
    digest = hashlib.blake2b(digest_size=32) if algorithm == "blake2b" else hashlib.new(algorithm)
    buffer = memoryview(bytearray(_CHUNK_BYTES))  # one for all chunks: a new one for each costs more than reading
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if not keep_on():
                raise StoppedError
    return digest.hexdigest()
