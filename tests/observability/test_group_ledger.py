"""The ledger of groups: every step once, also after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from perl_megatron.observability.group_ledger import GroupLedger
from perl_megatron.observability.json_lines import read_rows


def rows_of(step: int, count: int = 2) -> list[dict[str, object]]:
    return [{"step": step, "record": f"r{number}"} for number in range(count)]


def test_a_resumed_ledger_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    ledger = GroupLedger(path)
    for step in (1, 2, 3):
        ledger.write(step, rows_of(step))
    ledger.close()
    with path.open("a") as file:
        file.write('{"step": 4, "rec')  # killed in the middle of a line
    ledger = GroupLedger(path, resumed_step=2)
    ledger.write(3, rows_of(3, count=1))
    ledger.close()
    assert read_rows(path) == rows_of(1) + rows_of(2) + rows_of(3, count=1)


def test_a_new_run_begins_an_empty_ledger(tmp_path: Path) -> None:
    GroupLedger(tmp_path / "groups.jsonl").close()
    assert read_rows(tmp_path / "groups.jsonl") == []


def test_a_step_is_written_once(tmp_path: Path) -> None:
    ledger = GroupLedger(tmp_path / "groups.jsonl")
    ledger.write(1, rows_of(1))
    with pytest.raises(AssertionError, match="step 1"):
        ledger.write(1, rows_of(1))
    ledger.close()
