"""Files of records on file systems that find out late that they are full, as those of networks do."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest

from perl_megatron.observability import append_file
from perl_megatron.observability.append_file import AppendFile
from perl_megatron.observability.full_disk import FullDisk


class ReportsAtClose(io.FileIO):
    """What NFS does with rows that its server had no room for."""

    number = errno.ENOSPC

    def close(self) -> None:
        was_open = not self.closed
        super().close()
        if was_open:
            raise OSError(self.number, "reported at close")


def test_a_disk_that_is_found_full_at_close_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()
    file = AppendFile(tmp_path / "log", FullDisk(told.append), what="records")
    file._file.close()
    file._file = ReportsAtClose(tmp_path / "log", "ab")
    file.append(b"one\n")
    file.close()
    assert file._file.closed
    assert len(told) == 1
    assert "reported at close" in told[0]
    monkeypatch.setattr(ReportsAtClose, "number", errno.EIO)
    file._file = ReportsAtClose(tmp_path / "log", "ab")
    with pytest.raises(OSError, match="reported at close"):
        file.close()


def test_the_beginning_of_a_file_is_never_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        is_full = True

        def write(self, content: object) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)  # type: ignore[arg-type]

    monkeypatch.setattr(append_file, "MAX_WAITING_BYTES", 12)
    disk = FullDisk(lambda text: None)
    file = AppendFile(tmp_path / "log", disk, what="records")
    file._file.close()
    file._file = Full(tmp_path / "log", "ab")
    file.append(b"begin\n", count=0)
    for record in (b"one\n", b"two\n", b"six\n"):
        file.append(record)
    file._file.is_full = False
    file.close()
    assert (tmp_path / "log").read_bytes() == b"begin\nsix\n"
    assert disk.missing == {"records": 2}
