"""Two ranks that do not see the same files at the same time, as over NFS: checkpoints are whole, and the same for both.

What a rank sees is narrowed in its own process: names that are hidden from it are neither listed nor found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from perl_megatron.checkpoint import manifest, shared_folder
from perl_megatron.checkpoint.manifest import PendingCheckpoint, latest_checkpoint, verify_checkpoint
from perl_megatron.checkpoint.retention import MANIFEST, Retention
from perl_megatron.errors import UserError
from perl_megatron.runtime import collective


@contextmanager
def hidden(rank: int, name: str, *, looks: float = float("inf")) -> Iterator[None]:
    """From ``rank``, whatever is called ``name``: it is not listed, and not found when looked for ``looks`` times."""
    left = looks

    def listed(real: Callable[..., Iterator[Path]]) -> Callable[..., list[Path]]:
        return lambda self, *arguments: [path for path in real(self, *arguments) if name not in path.parts]

    def stat(self: Path, **options: Any) -> Any:
        nonlocal left
        if name in self.parts and left > 0:
            left -= 1
            raise FileNotFoundError(2, "not seen yet", str(self))
        return real_stat(self, **options)

    real_stat = Path.stat
    if collective.rank() != rank:
        yield
        return
    with (
        mock.patch.object(Path, "rglob", listed(Path.rglob)),
        mock.patch.object(Path, "iterdir", listed(Path.iterdir)),
        mock.patch.object(Path, "stat", stat),
    ):
        yield


def save(directory: Path, step: int, *, claimed: bool = True) -> Path:
    """Of four files of rank 0 and one of rank 1."""
    pending = PendingCheckpoint.begin(directory, step)
    mine = ["b"] if collective.rank() else ["a", "c", "d", "e"]
    for name in mine:
        (pending.temporary / name).write_text(f"{name} of step {step}")
    return pending.commit(Retention(), mine if claimed else ())


def failed(attempt: Callable[[], object]) -> list[str]:
    """What each rank was told."""
    told = ""
    try:
        attempt()
    except UserError as error:
        told = str(error)
    return collective.gather_objects(told)


def check_writing(directory: Path) -> None:
    for number, (rank, name) in enumerate([(1, "a"), (1, "b"), (0, "a")]):
        with hidden(rank, name, looks=0):  # its listing lacks what is there
            checkpoint = save(directory / "listed", number)
        verify_checkpoint(checkpoint)
    with hidden(1, "b", looks=0):  # nobody says what it has written, and rank 1's listing lags
        verify_checkpoint(save(directory / "unclaimed", 1, claimed=False))
    with hidden(0, "b", looks=3):
        checkpoint = save(directory / "late", 1)
    verify_checkpoint(checkpoint)
    assert '"b"' in (checkpoint / MANIFEST).read_text()
    with hidden(0, "b"):
        told = failed(lambda: save(directory / "never", 1))
    assert told[0] == told[1], told
    assert "rank 0 does not see b, which rank 1 has written" in told[0], told
    with hidden(1, "b"):
        told = failed(lambda: save(directory / "never", 1))
    assert told[0] == told[1], told
    assert "cannot be read: not seen yet" in told[0], told
    assert [path.name for path in (directory / "never").iterdir()] == [".incomplete-step-00000001"]


def resumed_from(directory: Path, refuse: Callable[[Path], None] = lambda checkpoint: None) -> list[str | None]:
    """The name of each rank's choice."""
    found = latest_checkpoint(directory, refuse=refuse)
    return collective.gather_objects(found and found.name)


def check_resuming(directory: Path) -> None:
    first, second = (save(directory, step) for step in (1, 2))
    with hidden(1, second.name, looks=0):
        assert resumed_from(directory) == [second.name] * 2
    seen = [first, second][: 2 - collective.rank()]
    with mock.patch.object(manifest, "list_checkpoints", return_value=seen):
        assert resumed_from(directory) == [second.name] * 2
    with hidden(1, MANIFEST):
        assert resumed_from(directory) == [second.name] * 2
    with hidden(1, "b", looks=3):
        assert resumed_from(directory) == [second.name] * 2
    with hidden(1, second.name):
        assert resumed_from(directory) == [first.name] * 2
    with hidden(0, second.name):
        assert resumed_from(directory) == [first.name] * 2

    def refused_by(rank: int) -> Callable[[Path], None]:
        def refuse(checkpoint: Path) -> None:
            if collective.rank() == rank and checkpoint == second:
                raise UserError("another run's")

        return refuse

    assert resumed_from(directory, refused_by(0)) == [first.name] * 2
    assert resumed_from(directory, refused_by(1)) == [second.name] * 2
    unreadable = OSError(5, "Input/output error")
    with (
        mock.patch.object(manifest, "list_checkpoints", side_effect=unreadable),  # rank 0's alone, told to both
        pytest.raises(OSError, match="Input/output error"),
    ):
        latest_checkpoint(directory)
    with mock.patch.object(manifest, "_digest", side_effect=unreadable) if collective.rank() else mock.MagicMock():
        told = failed(lambda: verify_checkpoint(second))
    assert told[0] == told[1], told
    assert "cannot be read: Input/output error" in told[0], told


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    shared_folder.SIGHT_SECONDS, shared_folder._POLL_SECONDS = 1.0, 0.01
    check_writing(directory / "writing")
    check_resuming(directory / "resuming")
    if collective.rank() == 0:
        (directory / "done").write_text("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
