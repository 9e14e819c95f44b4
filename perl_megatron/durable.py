"""Files that a power failure does not take back: written to the disk, names included, before anyone relies on them."""

from __future__ import annotations

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the files of a folder and of its folders, and their names, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file: at any moment it is the old one or the new one, and in the end the new one for good.

    OSError if that fails; nothing of the new one takes space then.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        sync_path(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)
