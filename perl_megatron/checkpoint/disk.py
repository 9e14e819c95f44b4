"""Folders that appear when they are whole and on the disk, and what a person is told when the disk fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from perl_megatron.durable import sync_folder, sync_path
from perl_megatron.errors import UserError, is_full_disk


class WriteFailure(UserError):
    """The target's disk, not the source or the options."""


def write_failure(error: OSError, what: str, path: Path) -> WriteFailure:
    """What a person is told when the operating system cannot write ``what`` to ``path``."""
    full = is_full_disk(error) or error.errno == errno.EFBIG
    fix = "free some space there, or choose another folder" if full else "choose a folder that can be written"
    return WriteFailure(f"cannot write {what}: {error.strerror or error}", where=str(path), fix=fix)


def file_inside(folder: Path, name: object, *, named_by: Path) -> Path:
    """The file of ``folder`` that an index (``named_by``) names; UserError where the name leads out of the folder."""
    if not isinstance(name, str) or not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise UserError(
            f"the index names a file outside the checkpoint: {name!r}",
            where=str(named_by),
            fix="take a checkpoint whose index names files of its own folder only",
        )
    return folder / name


def publish_folder(folder: Path, target: Path) -> None:
    """Give a folder its name once all of it is on the disk. OSError if that fails, or ``target`` exists."""
    sync_folder(folder)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "the target has appeared meanwhile", str(target))
    folder.rename(target)
    sync_path(target.parent)


def refuse_existing(target: Path) -> None:
    """UserError where ``target`` exists, be it a link to nothing."""
    if os.path.lexists(target):
        raise UserError("the target exists", where=str(target), fix="choose another name, or remove it")
