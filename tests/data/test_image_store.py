import io
import multiprocessing
import os
from pathlib import Path

import pytest
from PIL import Image

from perl_megatron.data import image_store
from perl_megatron.data.image_store import ImageStore, image_suffix
from perl_megatron.data.images import FORMATS
from perl_megatron.errors import UserError


def encoded(format: str = "PNG", shade: int = 7) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (28, 28), (shade, 0, 0)).save(content, format)
    return content.getvalue()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_that_images_may_have_is_known_by_its_header(tmp_path, format):
    path = ImageStore(tmp_path).add(encoded(format))
    assert path.suffix == image_suffix(encoded(format))
    with Image.open(path, formats=[format]) as image:
        assert image.format == format


def test_equal_contents_are_one_file(tmp_path):
    store = ImageStore(tmp_path / "store")
    first, other = store.add(encoded()), store.add(encoded(shade=8))
    before = first.stat().st_mtime_ns
    assert store.add(encoded()) == first != other
    assert first.stat().st_mtime_ns == before
    assert first.read_bytes() == encoded()
    assert files(store.folder) == sorted([first, other])
    assert first.stat().st_mode & 0o777 == 0o666 & ~_umask()  # readable for whoever may read the folder


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe", b"\x89PNG", b"P9\n", b"RIFF....WAVE"])
def test_what_is_no_image_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="image"):
        ImageStore(tmp_path).add(content)
    assert files(tmp_path) == []


def test_a_huge_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "MAX_IMAGE_BYTES", len(encoded()) - 1)
    with pytest.raises(UserError, match="more than"):
        ImageStore(tmp_path).add(encoded())


def test_a_file_that_a_power_failure_emptied_is_written_again(tmp_path):
    store = ImageStore(tmp_path)
    path = store.add(encoded())
    path.write_bytes(b"")
    assert store.add(encoded()).read_bytes() == encoded()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        ImageStore(tmp_path).add(encoded())
    assert files(tmp_path) == []


def add_all(folder: Path) -> None:
    for shade in range(40):
        ImageStore(folder).add(encoded("BMP", shade))


def test_several_processes_may_add_the_same_images_at_once(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=add_all, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(path.read_bytes() for path in files(tmp_path)) == sorted(encoded("BMP", n) for n in range(40))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
