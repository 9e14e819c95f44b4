"""What is kept of torchrun's account (with a real torchrun: test_torchrun.py)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from perl_megatron.launch import agent
from perl_megatron.launch.failures import DIRECTORY_VARIABLE, read_ends


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Whatever `main` changes in its process."""
    monkeypatch.setattr(sys, "argv", ["agent"])
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "")
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    before = {number: signal.getsignal(number) for number in agent.DEAF_TO}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(monkeypatch: pytest.MonkeyPatch, error: Exception, ends_by: type[BaseException] | None = None) -> Any:
    def run_module(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(agent.runpy, "run_module", run_module)
    with pytest.raises(ends_by or type(error)) as raised:
        agent.main()
    return raised.value


def test_who_ended_how_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the ranks' numbers in the whole job, and torch's own classes."""
    failures = {
        rank: ProcessFailure(local_rank=rank % 2, pid=4242, exitcode=code, error_file="none")
        for rank, code in ((2, 1), (3, -9))
    }
    run(monkeypatch, ChildFailedError("train", failures))
    assert read_ends(tmp_path) == {2: 1, 3: -9}


def test_a_rank_that_was_stopped_and_had_no_room_to_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its status is torchrun's: what the launcher can learn without a file."""
    failures = {0: ProcessFailure(local_rank=0, pid=4242, exitcode=75, error_file="none")}
    assert run(monkeypatch, ChildFailedError("train", failures), SystemExit).code == 75
    assert read_ends(tmp_path) == {0: 75}


def test_torchruns_own_errors_are_no_ends_of_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, RuntimeError("the rendezvous is gone"))
    assert read_ends(tmp_path) == {}
