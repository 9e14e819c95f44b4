import errno
import fcntl
import gc
import logging
import os
import pickle
import resource
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.data import pixel_store
from perl_megatron.data.pixel_store import PAGE_BYTES, PixelStore

ONE = 2 * PAGE_BYTES
"""Bytes of one of the images below, with its file's header."""


def pixels_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (28, 56, 3), dtype=np.uint8)


def put(store: PixelStore, number: int):
    return store.put(f"key{number}", pixels_of(number), source=f"source{number}")


@pytest.fixture
def store(tmp_path) -> PixelStore:
    return PixelStore(tmp_path, 4 * ONE)


def test_what_one_process_puts_another_finds(store):
    put(store, 1)
    other = pickle.loads(pickle.dumps(store))
    for image in (other.get("key1"), other.of_source("source1")):
        assert (image.key, image.is_shared) == ("key1", True)
        np.testing.assert_array_equal(image.pixels, pixels_of(1))
        with pytest.raises(ValueError, match="read-only"):
            image.pixels[0] = 0
    assert other.holds("key1")
    assert not other.holds("key2")
    assert other.get("key2") is other.of_source("source2") is None
    assert not other.holds("")  # asked for images of which no key is known


def test_files_with_equal_pixels_share_them(store):
    put(store, 1)
    store.put("key1", pixels_of(1), source="twin")
    assert store.of_source("twin").key == store.of_source("source1").key == "key1"
    assert store.num_bytes == ONE


def test_the_least_recently_used_are_dropped_and_nothing_is_left_of_them(store, tmp_path):
    for number in range(4):
        put(store, number)
    mapped = store.get("key1")
    assert store.holds("key0")
    put(store, 4)
    assert [number for number in range(5) if store.holds(f"key{number}")] == [0, 1, 4]
    assert sorted(path.name for path in (tmp_path / "sources").iterdir()) == ["source0", "source1", "source4"]
    for number in (5, 6, 7):
        put(store, number)
    assert not store.holds("key1")
    np.testing.assert_array_equal(mapped.pixels, pixels_of(1))  # whoever reads them can finish
    put(store, 1)
    assert store.of_source("source1").key == "key1"


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=40))
def test_the_bound_holds_over_all_processes(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("store")
    stores = {name: PixelStore(folder, 4 * ONE) for name in "abc"}
    for name, number in steps:
        image = stores[name].get(f"key{number}")
        np.testing.assert_array_equal((image or put(stores[name], number)).pixels, pixels_of(number))
        assert stores["a"].num_bytes <= 4 * ONE
    assert all(stores[name].holds(f"key{number}") for name, number in steps[-1:])
    shutil.rmtree(folder)


def test_threads_that_write_at_once_lose_nothing(tmp_path):
    stores = [PixelStore(tmp_path, 100 * ONE) for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        images = list(threads.map(lambda index: put(stores[index % 4], index // 4), range(80)))
    assert all(image.is_shared for image in images)
    assert stores[0].num_bytes == 20 * ONE
    assert int((tmp_path / "locks" / "bytes").read_bytes()) >= 20 * ONE
    assert not list((tmp_path / "pixels").glob("*.tmp"))


class SlowToGo:
    """Its end lets other threads go on, in the middle of whatever set off the garbage collection."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        for _ in range(20):
            pass


def test_threads_read_at_once_whatever_garbage_is_collected_meanwhile(store):
    """Files of NumPy's format were not read: CPython's gh-106905."""
    put(store, 1)
    expected = pixels_of(1)

    def read(_: int) -> None:
        for _ in range(200):
            SlowToGo()
            np.testing.assert_array_equal(store.get("key1").pixels, expected)

    seconds, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(read, range(8)))
    finally:
        sys.setswitchinterval(seconds)
        gc.set_threshold(*threshold)


def test_an_image_larger_than_the_bound_is_given_back_as_it_is(tmp_path, caplog):
    store = PixelStore(tmp_path, ONE - 1)
    image = put(store, 1)
    assert not image.is_shared
    np.testing.assert_array_equal(image.pixels, pixels_of(1))
    assert store.num_bytes == 0
    assert not caplog.records


def test_what_cannot_be_written_is_kept_by_the_process_which_says_so_once(store, caplog):
    put(store, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES, limits[1]))  # a disk that is full in the middle of a file
    try:
        with caplog.at_level(logging.WARNING):
            images = [put(store, 1), put(store, 2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (record,) = caplog.records
    assert "pixels cannot be shared" in record.getMessage()
    assert os.strerror(errno.EFBIG) in record.getMessage()
    for number, image in enumerate(images, 1):
        assert not image.is_shared
        np.testing.assert_array_equal(store.get(f"key{number}").pixels, pixels_of(number))
        assert store.of_source(f"source{number}").key == f"key{number}"
    assert pickle.loads(pickle.dumps(store)).get("key1") is None
    assert not list((store._folder / "pixels").glob("*.tmp"))
    assert put(store, 3).is_shared  # there is room again


def test_pixels_make_room_where_others_have_filled_the_disk(store, monkeypatch):
    for number in range(4):
        put(store, number)
    write, attempts = pixel_store._write_whole, []

    def full_at_first(path, pixels):
        attempts.append(store.num_bytes)
        if len(attempts) == 1:
            raise OSError(errno.ENOSPC, "no room")
        write(path, pixels)

    monkeypatch.setattr(pixel_store, "_write_whole", full_at_first)
    assert put(store, 4).is_shared
    assert attempts[1] <= attempts[0] / 2


def test_a_folder_that_is_gone_costs_no_run(store, tmp_path, caplog):
    put(store, 1)
    shutil.rmtree(tmp_path)
    with store.alone("source2"):
        assert not put(store, 2).is_shared
    assert store.get("key1") is None
    np.testing.assert_array_equal(store.of_source("source2").pixels, pixels_of(2))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["pixels", "sources", "locks"])
def test_a_part_of_the_folder_that_is_gone_is_made_anew(store, tmp_path, caplog, name):
    for number in range(4):
        put(store, number)
    shutil.rmtree(tmp_path / name)
    for number in (4, 5, 6):
        assert put(store, number).is_shared
        assert store.of_source(f"source{number}").is_shared
        assert store.num_bytes <= 4 * ONE
    assert not caplog.records


def test_a_folder_is_restored_once_for_each_image(tmp_path, caplog):
    calls = []
    store = PixelStore(tmp_path, 4 * ONE, restore=lambda: calls.append(tmp_path.mkdir()))
    shutil.rmtree(tmp_path)
    assert put(store, 1).is_shared
    assert len(calls) == 1
    shutil.rmtree(tmp_path)
    tmp_path.touch()  # in its way
    for number in (2, 3):
        assert not put(store, number).is_shared
    assert len(caplog.records) == 1
    tmp_path.unlink()
    assert put(store, 4).is_shared


def test_a_helper_makes_no_folder_and_leaves_what_it_cannot_share_to_whom_it_helps(store, tmp_path, caplog):
    helper = pickle.loads(pickle.dumps(store))
    shutil.rmtree(tmp_path)
    for helping in (helper, pickle.loads(pickle.dumps(store))):
        assert not put(helping, 1).is_shared
        assert not helping.holds("key1")
    tmp_path.mkdir()
    assert not put(helper, 1).is_shared
    assert not list(tmp_path.iterdir())
    assert not caplog.records
    assert put(store, 1).is_shared
    assert put(helper, 2).is_shared


def test_without_a_folder_everything_is_the_processs_own():
    store = PixelStore(None, 4 * ONE)
    with store.alone("source1"):
        assert not put(store, 1).is_shared
    assert store.holds("key1")
    np.testing.assert_array_equal(store.of_source("source1").pixels, pixels_of(1))
    assert store.num_bytes == 0
    helper = pickle.loads(pickle.dumps(store))
    put(helper, 1)
    assert not helper.holds("key1")  # whom it helps keeps it


def test_what_a_killed_writer_left_is_dropped_and_a_living_ones_is_not(store, tmp_path):
    left, fresh = (tmp_path / "pixels" / f"{name}.tmp" for name in ("left", "fresh"))
    for path in (left, fresh):
        path.write_bytes(bytes(ONE))
    long_ago = time.time() - 2 * pixel_store.LOCK_SECONDS
    os.utime(left, (long_ago, long_ago))
    for number in range(5):
        put(store, number)
    assert not left.exists()
    assert fresh.exists()


def test_nobody_waits_for_ever(store, tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_store, "LOCK_SECONDS", 0.05)
    with store.alone("source1"):
        (lock,) = (tmp_path / "locks").iterdir()
        descriptor = os.open(lock, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with store.alone("source1"):  # the holder may have been stopped
            pass
        os.close(descriptor)
