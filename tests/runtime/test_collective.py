"""Agreements of several threads: each over its own group, and in one process without any."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from launch_ranks import launch_ranks

from perl_megatron.errors import UserError
from perl_megatron.runtime import collective

LONG = 60.0
WORKER = Path(__file__).with_name("collective_worker.py")


def test_one_process_needs_no_group() -> None:
    assert collective.new_group(timeout_seconds=LONG) is None
    with collective.over(None):
        assert collective.gather_objects("mine") == ["mine"]
        assert (collective.any_rank(False), collective.any_rank(True)) == (False, True)
        collective.barrier()
    assert collective.shared_map(str, [1, 2]) == ["1", "2"]
    assert collective.shared_batches(lambda mine: mine[::-1], [1, 2]) == [2, 1]
    assert collective.gather_on_rank_zero("mine") == ["mine"]
    assert collective.from_rank_zero(lambda: "seen") == "seen"
    error = UserError("not here")

    def fail() -> None:
        raise error

    with pytest.raises(UserError) as met:
        collective.together(fail)
    assert met.value is error


def test_a_group_is_that_of_its_thread_and_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by what the call is given; torch's own group is None."""
    used: list[Any] = []

    def gather(gathered: list[Any], mine: Any, group: Any) -> None:
        used.append(group)
        gathered[:] = [mine, mine]

    monkeypatch.setattr(collective, "world_size", lambda: 2)
    monkeypatch.setattr(collective.dist, "all_gather_object", gather)
    outer, inner = object(), object()
    with collective.over(outer):  # type: ignore[arg-type]
        with collective.over(inner):  # type: ignore[arg-type]
            collective.gather_objects(1)
        collective.gather_objects(2)
        other = threading.Thread(target=collective.gather_objects, args=[3])
        other.start()
        other.join()
    collective.any_rank(True)
    assert used == [inner, outer, None, None]


def test_two_ranks_agree_from_two_threads_and_on_errors(tmp_path: Path) -> None:
    launch_ranks(WORKER, tmp_path / "done", log=tmp_path / "log", timeout=120)
    assert (tmp_path / "done").read_text() == "done"
