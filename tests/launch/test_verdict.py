"""The verdict of started processes; the commands themselves are in tests/verification and tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perl_megatron.launch import torchrun
from perl_megatron.launch.verdict import launch_for_verdict, verdict_status


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("own_file", [True, False])
def test_it_is_what_the_processes_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool, status: int, own_file: bool
) -> None:
    called = []

    def launch(argv: list[str], *, num_processes: int) -> int:
        called.append((argv[:2], num_processes))
        Path(argv[argv.index("--json") + 1]).write_text(json.dumps({"passed": passed}))
        return 0

    monkeypatch.setattr(torchrun, "launch", launch)
    file = tmp_path / "own.json" if own_file else None
    assert launch_for_verdict(["verify", "--tp"], num_processes=2, json_file=file, key="passed") == status
    assert called == [(["verify", "--tp"], 2)]
    assert list(tmp_path.iterdir()) == ([file] if own_file else [])


def test_processes_that_were_refused_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "launch", lambda argv, *, num_processes: 2)
    assert launch_for_verdict(["replay"], num_processes=2, json_file=None, key="finite") == 2


def test_a_launched_process_leaves_the_verdict_to_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(torchrun.LAUNCHER_VARIABLE, raising=False)
    assert (verdict_status(True), verdict_status(False)) == (0, 1)
    monkeypatch.setenv(torchrun.LAUNCHER_VARIABLE, "7")
    assert verdict_status(False) == 0
