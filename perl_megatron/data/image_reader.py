"""Image files to pixels: decoded by one of the node's processes, shared by all."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from perl_megatron.data.images import image_key, load_image
from perl_megatron.data.pixel_store import PixelStore, StoredImage


@dataclass(frozen=True)
class ImageReader:
    """``images.load_image``, where the pixels are not in the store already. Can be sent to other processes."""

    store: PixelStore
    min_pixels: int
    max_pixels: int

    def read(self, path: Path) -> StoredImage:
        """Content hash and resized pixels of an image file. Raises UserError as ``load_image`` does."""
        source = self._source(path)
        image = self.store.of_source(source)
        if image is None:
            with self.store.alone(source):
                image = self.store.of_source(source)  # another process may have been faster
                if image is None:
                    image = self._decode(path, source)
        return image

    def keep(self, path: Path, image: StoredImage) -> StoredImage:
        """Keep what another process decoded of the file and could not share."""
        return self.store.put(image.key, image.pixels, source=self._source(path))

    def _decode(self, path: Path, source: str) -> StoredImage:
        image = load_image(path, self.min_pixels, self.max_pixels)
        return self.store.put(image_key(image), np.asarray(image), source=source)

    def _source(self, path: Path) -> str:
        """A name for the file in its present state, and the bounds; a file that is replaced has another one."""
        try:
            status = os.stat(path)
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        except (OSError, ValueError):  # the latter: a path that no file can have
            state = (0, 0, 0, 0)  # reading it says why
        text = f"{path}\0{state}\0{self.min_pixels}\0{self.max_pixels}"
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def as_image(pixels: np.ndarray) -> Image.Image:
    """RGB image of uint8 [height, width, 3]."""
    return Image.fromarray(pixels)
