"""Folders that appear when they are whole and on the disk, and what a person is told when the disk fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from perl_megatron.errors import UserError, is_full_disk


class WriteFailure(UserError):
    """The target's disk, not the source or the options."""


def write_failure(error: OSError, what: str, path: Path) -> WriteFailure:
    """What a person is told when the operating system cannot write ``what`` to ``path``."""
    full = is_full_disk(error) or error.errno == errno.EFBIG
    fix = "free some space there, or choose another folder" if full else "choose a folder that can be written"
    return WriteFailure(f"cannot write {what}: {error.strerror or error}", where=str(path), fix=fix)


def sync_folder(folder: Path) -> None:
    """Wait until the files of a folder and of its folders, and their names, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
