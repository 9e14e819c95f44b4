"""Image files that a table's rows hold, or name: as bytes, by a path beside the table, or in a zip file there."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from perl_megatron.data.image_store import MAX_IMAGE_BYTES
from perl_megatron.errors import UserError

_UNREADABLE = (
    *(OSError, ValueError, RuntimeError, EOFError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
"""What reading a damaged zip file raises, or a path that no file can have."""


class TableImages:
    """Finds the bytes of images. Zip files are opened once and kept open.

    Args:
        folder: where images are that are named by path; None: the folder of their table.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._archives: dict[Path, list[tuple[zipfile.ZipFile, frozenset[str]]]] = {}

    def read(self, image: Any, table: Path) -> bytes:
        """The image's file. ``image`` is its bytes, its path, or ``{"bytes": …, "path": …}`` with one of them.

        Raises ``UserError`` where it is none of these, is not there, is too large, or leads out of the folder.
        """
        path = image
        if isinstance(image, dict):
            path = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(path, bytes):
            return path
        if not isinstance(path, str) or not path:
            raise UserError("the image has neither bytes nor a path", fix="check the column 'images'")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise UserError(f"the image path '{path}' leaves the folder", fix="write it relative to source.images")
        folder = self._folder or table.parent
        try:
            if (folder / path).is_file():
                if (folder / path).stat().st_size > MAX_IMAGE_BYTES:
                    raise UserError(f"the image '{path}' is larger than {MAX_IMAGE_BYTES} bytes", fix="reduce it")
                return (folder / path).read_bytes()
            return self._from_archive(path, folder)
        except _UNREADABLE as error:
            raise UserError(f"cannot read the image '{path}': {error}", where=str(folder)) from error

    def close(self) -> None:
        """Close the zip files."""
        for archives in self._archives.values():
            for archive, _ in archives:
                archive.close()
        self._archives.clear()

    def _from_archive(self, path: str, folder: Path) -> bytes:
        if folder not in self._archives:
            archives = [zipfile.ZipFile(file) for file in sorted(folder.glob("*.zip"))]
            self._archives[folder] = [(archive, frozenset(archive.namelist())) for archive in archives]
        for archive, names in self._archives[folder]:
            for name in (path, f"{folder.name}/{path}"):
                if name in names:
                    if archive.getinfo(name).file_size > MAX_IMAGE_BYTES:
                        raise UserError(f"the image '{path}' is larger than {MAX_IMAGE_BYTES} bytes", fix="reduce it")
                    return archive.read(name)
        raise UserError(
            f"the image '{path}' is not there",
            where=str(folder),
            fix="set source.images, or put the images or their zip file beside the table",
        )
