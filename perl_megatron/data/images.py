"""Images: checked when the records are read, resized once, and named by their content.

Engine and trainer both get the pixels of ``load_image``; neither may resize again. (In the released PeRL code
``max_pixels`` reaches only the trainer, so that the rollouts see another resolution.)
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from perl_megatron.data.image_store import MAX_IMAGE_BYTES
from perl_megatron.errors import UserError
from perl_megatron.runtime.image_errors import image_fault
from perl_megatron.runtime.regular_file import open_regular

MERGED_PATCH = 28
"""Side in pixels of one merged patch (2 × 2 patches of 14 × 14): Qwen2.5-VL's resize factor."""
MAX_ASPECT_RATIO = 200
"""Longer side over shorter side; beyond it Qwen2.5-VL's smart_resize refuses an image."""
MAX_SOURCE_PIXELS = 89_478_485
"""Images with more pixels are refused unread (Pillow's own bound against decompression bombs, made an error)."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's other readers are not used on a user's files: some of them (EPS) start external programs."""


def smart_resize(height: int, width: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) that Qwen2.5-VL resizes an image to: multiples of 28, near the same aspect ratio and area.

    Both sides are rounded; above ``max_pixels`` both are scaled by β = √(h·w / max) and rounded down (to 28 at least);
    below ``min_pixels`` they are scaled up and rounded up. A very long image can end above ``max_pixels``, because no
    side gets shorter than 28. Raises ``UserError`` for an aspect ratio above 200.
    """
    if min(height, width) < 1:
        raise UserError(f"an image of {width}x{height} pixels is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UserError(
            f"an image of {width}x{height} pixels has an aspect ratio above {MAX_ASPECT_RATIO}",
            fix="crop or split the image",
        )
    new_height, new_width = round(height / MERGED_PATCH), round(width / MERGED_PATCH)
    if new_height * new_width * MERGED_PATCH**2 > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(1, math.floor(height / scale / MERGED_PATCH))
        new_width = max(1, math.floor(width / scale / MERGED_PATCH))
    elif new_height * new_width * MERGED_PATCH**2 < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / MERGED_PATCH)
        new_width = math.ceil(width * scale / MERGED_PATCH)
    return new_height * MERGED_PATCH, new_width * MERGED_PATCH


def check_image(path: Path, content: bytes | None = None) -> None:
    """Decode the whole image and forget it; with ``content`` the image of these bytes, which came from ``path``.

    Raises ``UserError`` (naming the file) where it is missing, no regular file, corrupt, truncated, not an image, too
    large (in bytes or pixels) to be decoded safely, or has an aspect ratio above 200.
    """
    image = _decode(path, content)
    _resized_sides(image, path, min_pixels=MERGED_PATCH**2, max_pixels=MAX_SOURCE_PIXELS)


def load_image(path: Path, min_pixels: int, max_pixels: int) -> Image.Image:
    """The image as RGB, upright, on white where it is transparent, resized once (bicubic) by ``smart_resize``.

    Raises ``UserError`` as ``check_image`` does. Only the first frame of an animation is read.
    """
    if not MERGED_PATCH**2 <= min_pixels <= max_pixels:
        raise UserError(
            f"min_pixels {min_pixels} and max_pixels {max_pixels} do not satisfy 784 <= min_pixels <= max_pixels",
            where="data.min_pixels, data.max_pixels",
            fix="one merged patch is 28x28 = 784 pixels; set max_pixels to min_pixels or more",
        )
    image = _decode(path)
    height, width = _resized_sides(image, path, min_pixels=min_pixels, max_pixels=max_pixels)
    image = _to_rgb(image)
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def image_key(image: Image.Image) -> str:
    """32 hexadecimal digits of a hash of size and pixels: equal RGB images have equal keys, whatever their files."""
    digest = hashlib.blake2b(f"{image.mode}{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _decode(path: Path, content: bytes | None = None) -> Image.Image:
    """The image with its pixels decoded and its EXIF rotation applied."""
    try:
        with open_regular(path) if content is None else io.BytesIO(content) as file:
            num_bytes = os.fstat(file.fileno()).st_size if content is None else len(content)
            if num_bytes > MAX_IMAGE_BYTES:
                what = f"the image has {num_bytes} bytes, more than {MAX_IMAGE_BYTES}"
                raise UserError(what, where=str(path), fix="reduce the image before training")
            with Image.open(file, formats=FORMATS) as image:
                too_large = image.width * image.height > MAX_SOURCE_PIXELS
                if not too_large:
                    image.load()
                    return ImageOps.exif_transpose(image)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError("image file not found", where=str(path), fix="check the path in the record") from error
    except Image.DecompressionBombError:
        too_large = True
    # Pillow's readers raise nearly anything on corrupt bytes (OSError, SyntaxError, struct.error); ValueError: a path
    # that no file can have.
    except Exception as error:
        raise UserError(
            f"cannot read the image: {image_fault(error)}",
            where=str(path),
            fix=f"replace the file by a whole image ({', '.join(FORMATS)})",
        ) from error
    assert too_large
    raise UserError(
        f"the image has more than {MAX_SOURCE_PIXELS} pixels", where=str(path), fix="reduce the image before training"
    )


def _resized_sides(image: Image.Image, path: Path, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    try:
        return smart_resize(image.height, image.width, min_pixels=min_pixels, max_pixels=max_pixels)
    except UserError as error:
        raise UserError(error.what, where=str(path), fix=error.fix) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit grey: Pillow's own conversion clips at 255, which turns nearly everything white.
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, transparent).convert("RGB")
    return image.convert("RGB")
