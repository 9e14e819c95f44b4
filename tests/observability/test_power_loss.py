"""After a power failure, a run is there with its name, its settings and the rows up to its last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from watched_disk import watched_disk

from perl_megatron.config.load import load_config
from perl_megatron.observability.group_ledger import GroupLedger
from perl_megatron.observability.json_lines import read_rows, write_bytes, write_rows
from perl_megatron.observability.metrics_log import MetricsLog
from perl_megatron.observability.run_folder import RunFolder


def test_what_nobody_waited_for_is_seen(tmp_path: Path) -> None:
    with watched_disk() as disk:
        write_bytes(tmp_path / "picture.png", b"picture")
    assert disk.lost() == [str(tmp_path / "picture.png.tmp"), str(tmp_path)]


def test_a_resumed_run_cannot_lose_its_rows(tmp_path: Path) -> None:
    rows = [{"step": step} for step in (1, 2, 3)]
    for name in ("metrics.jsonl", "groups.jsonl"):
        write_rows(tmp_path / name, rows)
    with watched_disk() as disk:
        log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resumed_step=2)
        ledger = GroupLedger(tmp_path / "groups.jsonl", resumed_step=2)
    assert disk.lost() == []
    for file in (log, ledger):
        file.close()
        assert read_rows(tmp_path / ("metrics.jsonl" if file is log else "groups.jsonl")) == rows[:2]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_cannot_lose_its_identity_or_its_settings(resume: bool, tmp_path: Path) -> None:
    loaded = load_config(None, ["model.path=m", f"run.directory={tmp_path / 'runs'}", "run.name=demo"])
    if resume:
        RunFolder.create(loaded, resume=False)
    with watched_disk() as disk:
        folder = RunFolder.create(loaded, resume=resume)
    assert folder.read_identity()
    assert disk.lost() == []
