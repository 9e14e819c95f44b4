"""What is said of steps that wait for data."""

from __future__ import annotations

import re

import pytest

from perl_megatron.config.schema import DataConfig
from perl_megatron.data.wait_clock import DataWaits
from perl_megatron.data_idle import MAX_SHARE, STEPS, DataIdle
from perl_megatron.observability.metrics import check_names


def notes_of(*waits: DataWaits, **data: object) -> list[str]:
    """What is noted of steps of one second with these waits."""
    notes: list[str] = []
    idle = DataIdle(DataConfig.model_validate(data), notes.append)
    for one in waits:
        idle.follow(one, 1.0)
    return notes


def test_the_share_is_logged_at_every_step() -> None:
    idle = DataIdle(DataConfig(), lambda text: None)
    for _ in range(2):
        metrics = idle.follow(DataWaits(0.5, 0.3, 0.1), 2.0)
        assert metrics == {"data/idle_share": 0.25, "data/image_wait_seconds": 0.3}
    check_names(metrics)


def test_waits_are_said_once_after_several_steps() -> None:
    slow = DataWaits(0.2, 0.2)
    assert notes_of(*[slow] * STEPS) == []  # the first one counts for nothing
    (note,) = notes_of(*[slow] * (STEPS + 1))
    assert f"the last {STEPS} steps waited for data for 20% of their time, 0.2 s a step" in note
    assert notes_of(*[slow] * 30) == [note]


def test_one_slow_step_is_no_bottleneck() -> None:
    just_below = DataWaits(0.99 * MAX_SHARE)
    assert notes_of(DataWaits(0.9), *[just_below] * 30) == []
    assert notes_of(*[DataWaits()] * 9, DataWaits(0.99 * STEPS * MAX_SHARE), *[DataWaits()] * 9) == []
    assert len(notes_of(*[DataWaits()] * 9, *[DataWaits(1.01 * MAX_SHARE)] * STEPS)) == 1


@pytest.mark.parametrize(
    ("waits", "fix"),
    [
        (DataWaits(0.2, 0.15), r"raise data\.decode_processes = 3"),
        (DataWaits(0.2, 0.15, 0.0, True), r"raise data\.decode_ahead_mib = 100, and data\.pixel_cache_mib = 64"),
        (DataWaits(0.2, 0.15, 0.12), r"raise data\.pixel_cache_mib = 64"),
        (DataWaits(0.2, 0.05), r"data\.check=load"),
    ],
)
def test_the_fix_is_that_of_what_was_waited_for(waits: DataWaits, fix: str) -> None:
    (note,) = notes_of(*[waits] * (STEPS + 1), decode_processes=3, decode_ahead_mib=100, pixel_cache_mib=64)
    assert re.search(fix, note)


def test_records_that_are_checked_at_load_are_not_told_to_be() -> None:
    (note,) = notes_of(*[DataWaits(0.2)] * (STEPS + 1), check="load")
    assert "fast disk" in note
    assert "data.check" not in note
