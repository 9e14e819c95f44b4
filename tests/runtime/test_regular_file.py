import os
import socket

import pytest

from perl_megatron.runtime.regular_file import open_regular, read_regular


def test_files_and_links_to_them_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name, 7) == b"content"
        assert read_regular(tmp_path / name, 6) is None


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "pipe-link").symlink_to("pipe")
    for name in ("pipe", "zero", "pipe-link"):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="No such device"):
            open_regular(tmp_path / "socket")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")
    with pytest.raises(ValueError, match="null"):
        open_regular(tmp_path / "a\0b")


def test_nothing_stays_open(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError):
            open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before
