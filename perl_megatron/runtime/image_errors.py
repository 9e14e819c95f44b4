"""What Pillow could not read, in words that are the same each time."""

from __future__ import annotations

from PIL import UnidentifiedImageError


def image_fault(error: Exception) -> str:
    """Why an image could not be read, of what Pillow raised for it.

    Pillow names an open file by its descriptor or its address in memory ("cannot identify image file
    <_io.BufferedReader name=17>"): no user knows it, and the same record would be told otherwise by each rank and each
    time. The caller names the image.
    """
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format begins like this file"
    return str(error)
