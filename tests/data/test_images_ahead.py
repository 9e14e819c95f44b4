import itertools
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pool_functions
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import perl_megatron
from perl_megatron.data import image_reader, worker_pool
from perl_megatron.data.image_reader import ImageReader
from perl_megatron.data.images import load_image
from perl_megatron.data.images_ahead import ImagesAhead, in_turn
from perl_megatron.data.pixel_store import PixelStore
from perl_megatron.data.worker_pool import WorkerDied
from perl_megatron.errors import UserError

BOUNDS = (28 * 28, 56 * 56)
IMAGE_BYTES = 56 * 56 * 3


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(12)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (90, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture
def reader(request, tmp_path) -> ImageReader:
    """With a store in a folder; with the parameter False, one that cannot be shared."""
    folder = tmp_path / "store"
    folder.mkdir()
    return ImageReader(PixelStore(folder if getattr(request, "param", True) else None, 2**20), *BOUNDS)


@pytest.fixture
def ahead(reader):
    made = ImagesAhead(reader, num_processes=2, max_bytes=2**30)
    yield made
    made.close()


def settled(ahead: ImagesAhead, num_bytes: int) -> None:
    deadline = time.monotonic() + 60
    while ahead.num_bytes != num_bytes:
        assert time.monotonic() < deadline, f"{ahead.num_bytes} bytes wait, not {num_bytes}"
        time.sleep(0.01)


@pytest.mark.parametrize("reader", [True, False], indirect=True, ids=["shared", "not shared"])
def test_expected_and_other_images_are_those_of_load_image(ahead, paths, monkeypatch):
    whole = [load_image(path, *BOUNDS) for path in paths]
    size = sum(len(image.tobytes()) for image in whole[:6])
    ahead.expect(paths[:6])
    settled(ahead, size)
    with monkeypatch.context() as patch:
        patch.setattr(image_reader, "load_image", None)  # decoded elsewhere
        loaded = [ahead.read(path).pixels for path in paths[:6]]
    loaded += [ahead.read(path).pixels for path in paths[6:]]
    for pixels, image in zip(loaded, whole, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(image))
    assert ahead.num_bytes == 0
    assert not any(map(ahead.holds, paths))


def test_memory_is_bounded_and_work_goes_on_as_images_are_taken(reader, paths):
    one = len(load_image(paths[0], *BOUNDS).tobytes())
    ahead = ImagesAhead(reader, num_processes=1, max_bytes=3 * one)
    try:
        ahead.expect(paths)
        while ahead.num_bytes < 3 * one:
            time.sleep(0.002)
        assert not ahead.take_was_full()
        ahead.expect(paths)
        assert ahead.take_was_full()
        assert not ahead.take_was_full()
        peak = 0
        for path in paths:
            for _ in range(10):
                peak = max(peak, ahead.num_bytes)
                time.sleep(0.002)
            assert ahead.read(path).pixels.tobytes() == load_image(path, *BOUNDS).tobytes()
        assert 0 < peak <= 3 * one + 2 * one  # and the two that were under way
    finally:
        ahead.close()


def test_what_is_no_longer_expected_is_let_go(ahead, paths):
    ahead.expect(paths[:4])
    settled(ahead, sum(len(load_image(path, *BOUNDS).tobytes()) for path in paths[:4]))
    ahead.expect(paths[3:5])
    settled(ahead, sum(len(load_image(path, *BOUNDS).tobytes()) for path in paths[3:5]))
    assert [path for path in paths if ahead.holds(path)] == paths[3:5]


def test_errors_are_those_of_load_image(ahead, tmp_path, paths):
    missing, broken = tmp_path / "missing.png", tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:100])
    ahead.expect([missing, broken, paths[0]])
    settled(ahead, len(load_image(paths[0], *BOUNDS).tobytes()))
    for path, reason in [(missing, "not found"), (broken, "cannot read the image")]:
        with pytest.raises(UserError, match=reason):
            ahead.read(path)
        with pytest.raises(UserError, match=reason):
            ahead.read(path)  # not expected any more
    assert ahead.read(paths[0]).pixels.size


@pytest.mark.parametrize("deaths", [1, 2])
def test_an_image_is_tried_again_where_the_process_that_had_it_was_killed(reader, tmp_path, paths, deaths, caplog):
    path = Path(shutil.copy(paths[0], tmp_path))
    dying = pool_functions.DyingReader(reader.store, *BOUNDS)
    ahead = ImagesAhead(dying, num_processes=1, max_bytes=2**30)
    try:
        for number in range(deaths):
            (tmp_path / f"death{number}").touch()
        ahead.expect([path, paths[1]])
        if deaths == 1:
            assert ahead.read(path).pixels.tobytes() == load_image(path, *BOUNDS).tobytes()
        else:
            with pytest.raises(WorkerDied, match=r"died \(status -9\)"):
                ahead.read(path)
        assert ahead.read(paths[1]).pixels.size
    finally:
        ahead.close()
    assert caplog.text.count("it is tried once more") == 1


def test_a_decoder_that_fails_is_named_with_its_image(ahead, paths, caplog):
    """Each time, and not as if none were decoded ahead."""
    for path in paths[:2]:
        failed = ahead._begun[path] = Future()
        failed.set_exception(RuntimeError("in a worker process: an error"))
        assert ahead.read(path).pixels.tobytes() == load_image(path, *BOUNDS).tobytes()
        assert f"{path} could not be decoded ahead" in caplog.text
    assert "by this process" not in caplog.text


def test_without_processes_images_are_decoded_here(reader, paths, monkeypatch, caplog):
    monkeypatch.setattr(worker_pool.sys, "executable", "/nowhere/python")
    ahead = ImagesAhead(reader, num_processes=1, max_bytes=2**30)
    ahead.expect(paths[:4])
    for path in paths[:4]:
        assert ahead.read(path).pixels.tobytes() == load_image(path, *BOUNDS).tobytes()
    ahead.close()
    assert caplog.text.count("could not be started") == 1


@given(count=st.integers(0, 60), processes=st.integers(1, 5), own=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_processes_of_a_node_begin_with_images_of_their_own(count, processes, own):
    wanted = [Path(f"{number}.png") for number in range(count)]
    orders = [in_turn(wanted, (number, processes), own=own) for number in range(processes)]
    for order in orders:
        assert sorted(order) == sorted(wanted)
        for position, path in enumerate(order):  # nobody runs ahead of what is needed
            assert abs(position - wanted.index(path)) < own * processes
    assert in_turn(wanted, (0, 1), own=own) == wanted


def test_processes_of_a_node_decode_at_the_same_time(reader, tmp_path):
    """Those of two trainers that want the same images in the same order."""
    wanted = [tmp_path / f"{number}.png" for number in range(24)]
    slow = pool_functions.SlowReader(reader.store, *BOUNDS)
    aheads = [ImagesAhead(slow, num_processes=1, max_bytes=2**30, turn=(number, 2)) for number in range(2)]
    for path in wanted:
        Image.new("RGB", (28, 28), tuple(int(path.stem).to_bytes(3, "big"))).save(path)
    try:
        for ahead in aheads:
            ahead.expect(wanted[:1])
            ahead.read(wanted[0])  # its process has started
        for ahead in aheads:
            ahead.expect(wanted[1:])
        for ahead in aheads:
            settled(ahead, 23 * 28 * 28 * 3)
    finally:
        for ahead in aheads:
            ahead.close()
    times = sorted(tuple(map(float, path.read_text().split())) for path in tmp_path.glob("*.times"))
    assert len(times) == 24  # each once
    beside_another = sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(times[1:]))
    assert beside_another > 0  # none, where both begin with the same image; a busy machine leaves few


def test_threads_may_take_at_once(ahead, paths):
    taken: dict[Path, bytes] = {}
    ahead.expect(paths)

    def take(share: list[Path]) -> None:
        for path in share:
            taken[path] = ahead.read(path).pixels.tobytes()

    threads = [threading.Thread(target=take, args=(paths[number::3],)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert taken == {path: load_image(path, *BOUNDS).tobytes() for path in paths}


ENDS_WHILE_IMAGES_ARE_DECODED = """
import sys
from concurrent.futures import Future
from pathlib import Path
from perl_megatron.data import node_folder
from perl_megatron.data.image_reader import ImageReader
from perl_megatron.data.images_ahead import ImagesAhead

node_folder.SHARED_MEMORY = Path(sys.argv[1])
remove = node_folder._remove_if_dead
def say_who_is_left(lock_path):
    remove(lock_path)
    print("workers:", sum(thread.is_alive() for thread in ahead._pool._threads), "folder:", lock_path.exists())
ahead = ImagesAhead(ImageReader(node_folder.own_pixels(2**20), 784, 784), num_processes=2, max_bytes=2**20)
node_folder._remove_if_dead = say_who_is_left
ahead.expect(map(Path, sys.argv[2:]))
ahead.read(Path(sys.argv[2]))
"""


def test_processes_that_decode_ahead_end_before_the_folder_is_removed(tmp_path, paths):
    ended = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_IMAGES_ARE_DECODED, tmp_path, *paths],
        capture_output=True,
        text=True,
        cwd=Path(perl_megatron.__file__).parents[1],
        check=False,
    )
    assert (ended.stdout, ended.stderr) == ("workers: 0 folder: False\n", "")
