"""Image files that a table's rows hold, or name: as bytes, by a path beside the table, or in a zip file there."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from perl_megatron.data.image_store import MAX_IMAGE_BYTES
from perl_megatron.data.links import leaves
from perl_megatron.errors import UserError
from perl_megatron.runtime.regular_file import read_regular

_UNREADABLE = (
    *(OSError, ValueError, RuntimeError, EOFError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
"""What reading a damaged zip file raises, or a path that no file can have."""


class TableImages:
    """Finds the bytes of images. Zip files are opened once and kept open.

    Args:
        folder: where images are that are named by path; None: the folder of their table.
        follow_links: images may be symbolic links that leave it.
    """

    def __init__(self, folder: Path | None, *, follow_links: bool = False):
        self._folder, self._follow_links = folder, follow_links
        self._archives: dict[Path, list[tuple[zipfile.ZipFile, frozenset[str]]]] = {}

    def read(self, image: bytes | str, table: Path) -> bytes:
        """The image's file. ``image`` is its bytes, or its path.

        Raises ``UserError`` where it is not there, is too large, or leads out of the folder.
        """
        if isinstance(image, bytes):
            return image
        if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
            raise UserError(f"the image path '{image}' leaves the folder", fix="write it relative to source.images")
        folder = self._folder or table.parent
        try:
            if (folder / image).is_file():
                if not self._follow_links and leaves(folder / image, folder):
                    what = f"the image '{image}' is a link that leaves the folder"
                    raise UserError(what, where=str(folder), fix="set source.follow_links=true if you made the link")
                content = read_regular(folder / image, MAX_IMAGE_BYTES)
                if content is None:
                    raise UserError(f"the image '{image}' is larger than {MAX_IMAGE_BYTES} bytes", fix="reduce it")
                return content
            return self._from_archive(image, folder)
        except UserError:
            raise
        except _UNREADABLE as error:
            raise UserError(f"cannot read the image '{image}': {error}", where=str(folder)) from error

    def close(self) -> None:
        """Close the zip files."""
        for archives in self._archives.values():
            for archive, _ in archives:
                archive.close()
        self._archives.clear()

    def _from_archive(self, path: str, folder: Path) -> bytes:
        if folder not in self._archives:
            archives = [zipfile.ZipFile(file) for file in sorted(folder.glob("*.zip")) if file.is_file()]
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
