"""Who holds a lock: what the comments say of forked children and started programs is tried here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perl_megatron.sweep.file_lock import FileLock

WAITS = "import sys; sys.stdin.read()"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


def start(*descriptors: int) -> subprocess.Popen[bytes]:
    """A program that lives until its input ends, and is given these."""
    return subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE, pass_fds=descriptors)


def end(child: subprocess.Popen[bytes]) -> None:
    child.communicate(b"")
    assert child.returncode == 0


def is_free(path: Path) -> bool:
    other = FileLock(path)
    try:
        return other.try_acquire()
    finally:
        other.close()


def test_a_program_that_is_given_the_descriptor_holds_the_lock_when_its_parent_has_let_go(path: Path) -> None:
    lock = FileLock(path)
    assert lock.try_acquire()
    child = start(lock.descriptor)
    lock.close()
    assert not is_free(path)
    end(child)
    assert is_free(path)


def test_a_program_that_is_not_given_it_holds_nothing(path: Path) -> None:
    lock = FileLock(path)
    assert lock.try_acquire()
    child = start()
    lock.close()
    assert is_free(path)
    end(child)


def test_what_a_program_starts_does_not_inherit_it_further(path: Path) -> None:
    """So the ranks below a launcher do not hold the lock of their sweep's point."""
    lock = FileLock(path)
    assert lock.try_acquire()
    child = f"subprocess.Popen([sys.executable, '-c', {WAITS!r}], stdin=int(sys.argv[1]))"
    reader, writer = os.pipe()
    command = [sys.executable, "-c", f"import subprocess, sys; {child}", str(reader)]
    subprocess.run(command, pass_fds=(lock.descriptor, reader), check=True)
    lock.close()
    assert is_free(path)
    os.close(writer)
    os.close(reader)


def test_a_forked_child_holds_it_until_it_ends_or_anyone_releases_it(path: Path) -> None:
    lock = FileLock(path)
    assert lock.try_acquire()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    lock.release()
    assert is_free(path), "released for the child too"
    assert lock.try_acquire()
    lock.close()
    assert not is_free(path), "closed here, and open in the child"
    os.close(writer)
    os.waitpid(child, 0)
    assert is_free(path)
