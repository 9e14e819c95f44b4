import logging
import os
import shutil
import signal
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from launch_ranks import running_ranks
from tiny_checkpoint import make_images

from perl_megatron.data import node_folder
from perl_megatron.data.node_folder import NodeFolder, node_pixels, own_pixels
from perl_megatron.runtime import collective

Usage = namedtuple("Usage", "free")
GIB = 2**30


@pytest.fixture
def places(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Stand-ins for /dev/shm and the temporary folder; where this user's runs are in each."""
    parents = tmp_path / "shm", tmp_path / "tmp"
    for parent in parents:
        parent.mkdir()
    monkeypatch.setattr(node_folder, "SHARED_MEMORY", parents[0])
    monkeypatch.setattr(node_folder.tempfile, "gettempdir", lambda: str(parents[1]))
    name = f"perl_megatron-{os.getuid()}"
    return parents[0] / name, parents[1] / f"{name}-{node_folder.socket.gethostname()}"


def set_free(monkeypatch, places, *free: int) -> None:
    of = dict(zip(places, free, strict=True))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(of[Path(path)]))


@contextmanager
def process_in(place: Path, run: str):
    """Another process of a run, which ends when it is killed."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            folder = NodeFolder(place, run)
            (folder.path / "left").touch()
            os.write(writes, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writes)
    try:
        assert os.read(reads, 1) == b"!"
        yield child
    finally:
        os.close(reads)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def put(store, number: int):
    return store.put(f"key{number}", np.full((28, 28, 3), number, np.uint8), source=f"source{number}")


def test_the_last_process_removes_the_folder(tmp_path):
    one, other = NodeFolder(tmp_path, "run"), NodeFolder(tmp_path, "run")
    one.close()
    assert other.path.is_dir()
    one.close()  # nothing more
    other.close()
    assert not list(tmp_path.iterdir())


def test_a_run_whose_processes_were_killed_is_removed_by_the_next(places):
    place = places[0]
    place.mkdir(0o700)
    with process_in(place, "dead"), process_in(place, "dead"), process_in(place, "living"):
        first = own_pixels(2**20)
        assert (place / "dead" / "left").is_file()  # nobody's folder is taken away
        (left,) = (path for path in place.iterdir() if path.is_dir() and path.name not in ("dead", "living"))
        put(first, 1)
        assert (left / "pixels" / "key1.npy").is_file()
    with process_in(place, "living too"):
        second = own_pixels(2**20)
        names = {path.name for path in place.iterdir()}
        assert not {"dead", "dead.lock", "living"} & names
        assert {"living too", left.name} <= names
        assert first.holds("key1")
    del first, second  # with the store, its folder
    own_pixels(2**20)
    assert not list(place.iterdir())


def test_a_forked_process_does_not_let_go_of_its_parents_folder(tmp_path):
    folder = NodeFolder(tmp_path, "run")
    child = os.fork()
    if child == 0:
        folder.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    node_folder._remove_if_dead(tmp_path / "run.lock")
    assert folder.path.is_dir()
    folder.close()
    assert not folder.path.exists()


def test_a_lock_file_that_is_removed_in_the_meantime_is_made_again(tmp_path, monkeypatch):
    lock_path, flock = tmp_path / "run.lock", node_folder.fcntl.flock

    def too_late(descriptor, operation):
        monkeypatch.setattr(node_folder.fcntl, "flock", flock)
        flock(descriptor, operation)
        lock_path.unlink()

    monkeypatch.setattr(node_folder.fcntl, "flock", too_late)
    folder = NodeFolder(tmp_path, "run")
    node_folder._remove_if_dead(lock_path)
    assert lock_path.is_file()
    assert folder.path.is_dir()
    folder.close()


def test_shared_memory_is_taken_where_it_has_room(places, monkeypatch, caplog):
    shm, tmp = places
    for free, place, max_bytes, warned in [
        ((2 * GIB, 9 * GIB), shm, GIB, 0),
        ((2 * GIB - 1, 9 * GIB), tmp, GIB, 0),  # 64 MiB in a container, say
        ((GIB, GIB // 2), shm, GIB // 2, 1),
        ((GIB // 8, GIB // 2), tmp, GIB // 4, 1),
    ]:
        caplog.clear()
        set_free(monkeypatch, places, *free)
        store = own_pixels(GIB)
        assert store._folder.parent == place
        assert store.max_bytes == max_bytes
        assert len(caplog.records) == warned
    assert "up to 256 MiB of pixels are kept" in caplog.text


def test_a_folder_of_someone_else_is_not_used(places, tmp_path, caplog):
    shm, tmp = places
    shm.symlink_to(tmp_path)
    tmp.mkdir(0o700)
    tmp.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        store = own_pixels(2**20)
    assert store._folder is None
    assert "each process keeps its own pixels" in caplog.text
    put(store, 1)
    assert store.holds("key1")


def test_processes_of_a_node_agree_on_the_place_of_its_first_one(places, monkeypatch):
    shm, tmp = places
    host = node_folder.socket.gethostname()
    tmp.mkdir(0o700)

    def gather(mine):
        assert mine[0] == host
        return [("another host", "run0", (Path("/nowhere"), 5)), (host, "run1", (tmp, 7 * 2**20)), mine]

    monkeypatch.setattr(collective, "gather_objects", gather)
    one, other = node_pixels(2**20), node_pixels(2**20)
    assert one._folder == other._folder == tmp / "run0"
    assert one.max_bytes == 7 * 2**20
    put(one, 1)
    assert other.get("key1").is_shared
    assert not list(shm.glob("*.lock"))


def test_ranks_of_a_node_share_their_pixels_and_killed_ones_leave_nothing_for_long(tmp_path):
    (image,), told = make_images(tmp_path, [(60, 80)]), tmp_path / "folder"
    worker, log = Path(__file__).with_name("node_pixels_worker.py"), tmp_path / "log"
    with running_ranks(worker, image, told, log=log) as job:
        job.wait(120)
    assert told.exists(), log.read_text(errors="replace")[-3000:]
    own_pixels(2**20)  # the next run
    assert not Path(told.read_text()).exists()
