import logging
import os
import pickle
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
from perl_megatron.data.node_folder import NodeFolder, Offer, node_pixels, own_pixels
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
        assert (left / "pixels" / "key1.pixels").is_file()
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


def test_a_folder_that_is_written_to_while_it_is_removed_is_found_by_the_next_run(tmp_path, monkeypatch):
    folder, remove = NodeFolder(tmp_path, "run"), os.rmdir

    def too_late(path, **keys):
        if Path(path) == folder.path:
            (folder.path / "late").touch()
        remove(path, **keys)

    with monkeypatch.context() as writer:
        writer.setattr(os, "rmdir", too_late)
        folder.close()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.lock"}
    node_folder._remove_if_dead(tmp_path / "run.lock")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_removed_under_a_living_run_is_made_anew(places):
    """As systemd-logind does when a user logs out, with everything of the user's in /dev/shm."""
    place = places[0]
    store = own_pixels(2**20)
    folder = store._folder
    put(store, 1)
    helper = pickle.loads(pickle.dumps(store))
    shutil.rmtree(place)

    for image in (put(helper, 2), put(pickle.loads(pickle.dumps(store)), 2)):
        assert not image.is_shared  # and a process that holds no lock makes nothing that nobody would remove
    assert not place.exists()

    assert put(store, 2).is_shared
    assert helper.get("key2").is_shared
    other = own_pixels(2**20)
    assert store.holds("key2")  # nobody takes the folder for that of a dead run
    del store, other
    assert not folder.exists()
    assert not list(place.iterdir())


def test_processes_whose_folder_was_removed_go_on_whoever_ends_first(tmp_path):
    for last in (0, 1):
        place = tmp_path / str(last)
        place.mkdir(mode=0o700)
        folders = [NodeFolder(place, "run"), NodeFolder(place, "run")]
        shutil.rmtree(place)
        folders[0].restore()
        folders[1 - last].close()
        folders[last].restore()
        assert folders[last].path.is_dir()
        folders[last].close()
        folders[last].restore()  # not by those that have left it
        assert not list(place.iterdir())


def test_a_folder_is_not_made_anew_in_one_of_someone_else(places, tmp_path, caplog):
    store, theirs = own_pixels(2**20), tmp_path / "theirs"
    shutil.rmtree(places[0])
    theirs.mkdir()
    places[0].symlink_to(theirs)
    assert not put(store, 1).is_shared
    assert not list(theirs.iterdir())
    assert "is not a folder of this user alone" in caplog.text


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
    assert "is less than 1024 MiB: up to 256 MiB of pixels are kept" in caplog.text
    assert "data.pixel_cache_mib" not in caplog.text  # not of every store


def test_without_a_temporary_folder_shared_memory_is_enough(places, monkeypatch, caplog):
    def find_none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(node_folder.tempfile, "gettempdir", find_none)
    assert own_pixels(2**20)._folder.parent == places[0]
    assert not caplog.records
    set_free(monkeypatch, places[:1], 2**20)
    store = own_pixels(2**20)
    assert (store._folder.parent, store.max_bytes) == (places[0], 2**19)
    monkeypatch.setattr(node_folder, "SHARED_MEMORY", Path("/nowhere"))
    assert own_pixels(2**20)._folder is None
    for words in ("/nowhere", "No usable temporary directory found", "each process keeps its own pixels"):
        assert words in caplog.records[-1].getMessage()


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
        theirs = Offer(tmp, 7 * 2**20)
        return [("another host", "run0", Offer(Path("/nowhere"), 5)), (host, "run1", theirs), mine]

    monkeypatch.setattr(collective, "gather_objects", gather)
    one, other = node_pixels(2**20), node_pixels(2**20)
    assert one._folder == other._folder == tmp / "run0"
    assert one.max_bytes == 7 * 2**20
    put(one, 1)
    assert other.get("key1").is_shared
    assert not list(shm.glob("*.lock"))


def test_the_first_process_of_a_node_says_what_its_processes_get(places, monkeypatch, caplog):
    set_free(monkeypatch, places, GIB, GIB)
    told = []

    def gather(mine):
        told.append(mine)
        return [("another host", "run", Offer(None, 5, "said there")), *told]

    monkeypatch.setattr(collective, "gather_objects", gather)
    stores = [node_pixels(GIB), node_pixels(2 * GIB)]
    assert [store.max_bytes for store in stores] == [GIB // 2, GIB // 2]
    (record,) = caplog.records
    assert "is less than 1024 MiB: up to 512 MiB of pixels are kept" in record.getMessage()


def test_ranks_of_a_node_share_their_pixels_and_killed_ones_leave_nothing_for_long(tmp_path):
    (image,), told = make_images(tmp_path, [(60, 80)]), tmp_path / "folder"
    worker, log = Path(__file__).with_name("node_pixels_worker.py"), tmp_path / "log"
    with running_ranks(worker, image, told, log=log) as job:
        job.wait(120)
    assert told.exists(), log.read_text(errors="replace")[-3000:]
    own_pixels(2**20)  # the next run
    assert not Path(told.read_text()).exists()
