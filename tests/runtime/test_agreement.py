"""Ranks that are about to do different things are told so, on several processes."""

from __future__ import annotations

import json
from pathlib import Path

from plain_ranks import run_ranks

from perl_megatron.runtime.agreement import Agreement, _differences

WORKER = Path(__file__).with_name("agreement_worker.py")


def test_what_differs_is_named_with_its_ranks_on_all_of_them() -> None:
    found = [json.loads(result.stdout.splitlines()[-1]) for result in run_ranks(WORKER)]  # gloo prints lines too
    assert all(each["equal"] == "passed" for each in found)
    for each in found:
        assert "the ranks have diverged" in each["other value"]
        assert "tokens: 12 on ranks 0, 1; 13 on rank 2" in each["other value"]
        assert "step" not in each["other value"]
        assert 'phase: "update" on ranks 0, 2; "save" on rank 1' in each["other phase"]
        assert "tokens: 12 on ranks 0, 2; null on rank 1" in each["other phase"]
        assert each["equal again"] == "passed"


def test_one_process_agrees_with_itself() -> None:
    Agreement(10).compare({"phase": "update"})


def test_many_ranks_are_counted() -> None:
    lines = _differences([{"step": 1 + (rank == 20)} for rank in range(40)])
    assert lines == ["  step: 1 on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 31 more; 2 on rank 20"]
