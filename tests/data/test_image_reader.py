import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import make_images

from perl_megatron.data import image_reader
from perl_megatron.data.image_reader import ImageReader, as_image
from perl_megatron.data.images import image_key, load_image
from perl_megatron.data.images_ahead import in_turn
from perl_megatron.data.pixel_store import PixelStore, StoredImage
from perl_megatron.data.worker_pool import WorkerDied, WorkerPool
from perl_megatron.errors import UserError

BOUNDS = (28 * 28, 56 * 56)
Task = tuple[ImageReader, Path, Path]
"""Reader, image, and a folder for notes."""


def read_and_note(task: Task) -> tuple[str, bytes]:
    """Key and pixels; each decoding leaves a note. In a worker process."""
    reader, path, notes = task

    def decode(path: Path, *bounds: int) -> Image.Image:
        (notes / f"{path.stem}-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(0.02)  # so that others come while it is decoded
        return load_image(path, *bounds)

    image_reader.load_image = decode
    image = reader.read(path)
    assert image.is_shared
    return image.key, image.pixels.tobytes()


def die_while_writing(task: Task) -> None:
    """The process is killed when the file is written, but has no name yet. In a worker process."""
    reader, path, _ = task
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    reader.read(path)


@pytest.fixture
def reader(tmp_path) -> ImageReader:
    (tmp_path / "store").mkdir()
    return ImageReader(PixelStore(tmp_path / "store", 2**20), *BOUNDS)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png", "pipe.png", "x" * 5000 + ".png"])
def test_a_path_that_cannot_be_read_is_named_whatever_it_is(name, reader, tmp_path):
    """Where records are checked as they are drawn, another error would end the run."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="cannot read the image") as error:
        reader.read(tmp_path / name)
    assert error.value.where == str(tmp_path / name)
    assert in_turn([tmp_path / name], (0, 1), own=1) == [tmp_path / name]


def test_an_image_is_decoded_once_for_all_processes(reader, tmp_path):
    paths = make_images(tmp_path, [(60 + 9 * number, 80) for number in range(6)])
    (tmp_path / "notes").mkdir()
    with WorkerPool(read_and_note, 3) as pool:
        tasks = [(reader, path, tmp_path / "notes") for path in paths for _ in range(3)]
        answers = [pool.submit(task) for task in tasks]
        read = [answer.result() for answer in answers]
    for (_, path, _), (key, content) in zip(tasks, read, strict=True):
        image = load_image(path, *BOUNDS)
        assert (key, content) == (image_key(image), image.tobytes())
    decoded = sorted(note.name.rsplit("-", 2)[0] for note in (tmp_path / "notes").iterdir())
    assert decoded == sorted(path.stem for path in paths)


def test_threads_do_not_decode_twice_either(reader, tmp_path, monkeypatch):
    (path,) = make_images(tmp_path, [(60, 80)])
    calls, together = [], threading.Barrier(4)

    def decode(*arguments):
        calls.append(arguments)
        time.sleep(0.05)
        return load_image(*arguments)

    monkeypatch.setattr(image_reader, "load_image", decode)

    def read():
        together.wait()
        reader.read(path)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_process_that_is_killed_while_it_writes_holds_nobody_up(reader, tmp_path):
    (path,) = make_images(tmp_path, [(60, 80)])
    with WorkerPool(die_while_writing, 1) as pool, pytest.raises(WorkerDied):
        pool.submit((reader, path, tmp_path)).result()
    assert [left.suffix for left in (tmp_path / "store" / "pixels").iterdir()] == [".tmp"]
    begin = time.monotonic()
    image = reader.read(path)
    assert time.monotonic() - begin < 30, "it waited for a dead process"
    assert image.is_shared
    np.testing.assert_array_equal(image.pixels, np.asarray(load_image(path, *BOUNDS)))


def test_a_replaced_file_is_another_image(reader, tmp_path):
    (path,) = make_images(tmp_path, [(60, 80)])
    before = reader.read(path)
    Image.new("RGB", (28, 28), (1, 2, 3)).save(path)
    after = reader.read(path)
    assert before.key != after.key == image_key(load_image(path, *BOUNDS))
    assert reader.store.get(before.key).pixels.shape == before.pixels.shape


def test_other_bounds_give_other_pixels(reader, tmp_path):
    (path,) = make_images(tmp_path, [(200, 200)])
    larger = ImageReader(reader.store, 784, 112 * 112)
    assert reader.read(path).pixels.shape == (56, 56, 3)
    assert larger.read(path).pixels.shape == (112, 112, 3)
    assert reader.read(path).pixels.shape == (56, 56, 3)


def test_what_another_process_could_not_share_is_kept(reader, tmp_path, monkeypatch):
    (path,) = make_images(tmp_path, [(60, 80)])
    image = load_image(path, *BOUNDS)
    kept = reader.keep(path, StoredImage(image_key(image), np.asarray(image), False))
    monkeypatch.setattr(image_reader, "load_image", None)
    assert reader.read(path).key == kept.key == image_key(image)
    assert as_image(reader.read(path).pixels).tobytes() == image.tobytes()


def test_errors_are_those_of_load_image(reader, tmp_path):
    with pytest.raises(UserError, match="not found"):
        reader.read(tmp_path / "missing.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for _ in range(2):
        with pytest.raises(UserError, match="cannot read the image"):
            reader.read(tmp_path / "broken.png")
