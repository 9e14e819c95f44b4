import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perl_megatron.data.images import check_image, image_key, load_image, smart_resize
from perl_megatron.errors import UserError


def noise(width: int, height: int, *, channels: int = 3, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


def test_smart_resize_equals_transformers():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as reference

    generator = np.random.default_rng(1)
    compared = 0
    while compared < 3000:
        height, width = (int(side) for side in np.exp(generator.uniform(0, np.log(5000), 2)))
        if max(height, width) / min(height, width) > 200:
            continue
        low = int(np.exp(generator.uniform(np.log(784), np.log(10**6))))
        high = low + int(np.exp(generator.uniform(0, np.log(10**7))))
        ours = smart_resize(height, width, min_pixels=low, max_pixels=high)
        assert ours == reference(height, width, factor=28, min_pixels=low, max_pixels=high)
        assert min(ours) >= 28
        compared += 1


@pytest.mark.parametrize("sides", [(1, 201), (6000, 29)])
def test_extreme_aspect_ratios_are_refused(sides, tmp_path):
    with pytest.raises(UserError, match="aspect ratio"):
        smart_resize(*sides, min_pixels=784, max_pixels=10**6)
    path = tmp_path / "long.png"
    Image.new("RGB", sides).save(path)
    for read in (check_image, lambda path: load_image(path, 784, 10**6)):
        with pytest.raises(UserError, match=r"long\.png"):
            read(path)


def test_an_image_of_one_merged_patch_is_not_touched(tmp_path):
    image = noise(28, 28)
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 784, 784)
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.asarray(image))


def test_images_are_resized_once_by_bicubic(tmp_path):
    image = noise(100, 60)
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 784, 10**6)
    assert loaded.size == (112, 56)
    expected = image.resize((112, 56), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(loaded), np.asarray(expected))
    assert load_image(tmp_path / "a.png", 784, 784).size == (28, 28)
    assert load_image(tmp_path / "a.png", 28 * 28 * 100, 10**6).size == (364, 224)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 200, (200, 200, 200)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (7, 0), (255, 255, 255)),
        ("I;16", 128 * 256, (128, 128, 128)),
    ],
)
def test_all_modes_become_rgb(mode, value, expected, tmp_path):
    Image.new(mode, (28, 28), value).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 784, 784).getpixel((3, 4)) == expected


def test_palette_transparency_is_white(tmp_path):
    image = Image.new("P", (28, 28), 1)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "solid.png")
    assert load_image(tmp_path / "clear.png", 784, 784).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "solid.png", 784, 784).getpixel((0, 0)) == (50, 60, 70)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(56, 28).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg", 784, 10**6).size == (28, 56)


def test_keys_name_the_content(tmp_path):
    image = noise(28, 56)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    key = image_key(load_image(tmp_path / "a.png", 784, 10**6))
    assert key == image_key(load_image(tmp_path / "b.bmp", 784, 10**6))
    assert len(key) == 32
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    flat, tall = Image.new("RGB", (56, 28)), Image.new("RGB", (28, 56))
    assert len({key, image_key(changed), image_key(flat), image_key(tall)}) == 4


def saved(image: Image.Image, path: Path) -> bytes:
    image.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_truncated_files_are_refused_by_name(suffix, tmp_path):
    whole = saved(noise(64, 64), tmp_path / f"whole.{suffix}")
    check_image(tmp_path / f"whole.{suffix}")
    path = tmp_path / f"cut.{suffix}"
    for length in (0, 3, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"cut\.{suffix}"):
            check_image(path)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    whole = saved(noise(64, 64), tmp_path / "a.png")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(whole[:200] + bytes(64) + whole[264:])
    text = tmp_path / "text.png"
    text.write_text("not an image")
    postscript = tmp_path / "program.png"
    postscript.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\n")
    for path in (damaged, text, postscript, tmp_path / "missing.png", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            check_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_unread(tmp_path):
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    for side in (9500, 100_000):  # above the bound, and above the double, where Pillow raises by itself
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        path = tmp_path / f"bomb{side}.png"
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
        )
        with pytest.raises(UserError, match=rf"more than .* pixels[^?]*bomb{side}"):
            check_image(path)


def test_impossible_bounds_are_refused(tmp_path):
    noise(28, 28).save(tmp_path / "a.png")
    for low, high in ((783, 784), (1000, 999)):
        with pytest.raises(UserError, match="784 <= min_pixels <= max_pixels"):
            load_image(tmp_path / "a.png", low, high)
