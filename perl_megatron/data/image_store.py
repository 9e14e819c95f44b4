"""Image files under the names of their contents: an image that many records share is kept once.

    STORE/3f/3fa1…9c.png

A file appears under its name whole or not at all, so any number of processes may add to one store at once, and what an
interrupted import leaves is simply there at the next one.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from perl_megatron.errors import UserError

MAX_IMAGE_BYTES = 128 * 2**20
"""Larger files are refused: no image that the model can use needs so many."""
DIGEST_BYTES = 20
"""Of BLAKE2b: two of 10^9 images have the same name with probability 10^-30."""
PPM_HEADERS = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")


class ImageStore:
    """A folder of images, each named by the BLAKE2b hash of its file's bytes."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def add(self, content: bytes) -> Path:
        """Keep the image file ``content`` and return its path, the same one for the same bytes.

        Only the header is looked at, so a truncated image is taken (``images.check_image`` finds it). Raises
        ``UserError`` where the bytes are no image of a known format, are too many, or cannot be written.
        """
        if len(content) > MAX_IMAGE_BYTES:
            raise UserError(f"the image has {len(content)} bytes, more than {MAX_IMAGE_BYTES}", fix="reduce it")
        suffix = image_suffix(content)
        if suffix is None:
            what = "the image is empty" if not content else f"the bytes are no image: they begin with {content[:8]!r}"
            raise UserError(what, fix="give a BMP, GIF, JPEG, PNG, PPM, TIFF or WEBP image")
        name = hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest() + suffix
        path = self.folder / name[:2] / name
        try:
            # A machine that lost power can leave a name without its content.
            if not (path.is_file() and path.stat().st_size == len(content)):
                _write_whole(path, content)
        except OSError as error:
            raise UserError(
                f"cannot write an image: {error.strerror}", where=str(path), fix="free some space"
            ) from error
        return path


def image_suffix(content: bytes) -> str | None:
    """The file suffix of an image's format, read from its first bytes; None where these are no image's."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    if content.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return ".gif"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    if content.startswith((b"II*\x00", b"MM\x00*")):
        return ".tif"
    if content[:2] == b"BM" and len(content) >= 26:
        return ".bmp"
    if content.startswith(PPM_HEADERS) and content[2:3].isspace():
        return ".ppm"
    return None


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
