"""`perl-megatron triage` as a user calls it."""

import json

import pytest

from perl_megatron.cli import main
from perl_megatron.runtime import platform


@pytest.fixture(autouse=True)
def threads_stay(monkeypatch):
    """The command takes all cores, for the whole process."""
    monkeypatch.setattr(platform, "set_threads", lambda: 1)


def test_status_0_without_a_mismatch(first_step, tmp_path, capsys):
    file = tmp_path / "triage.json"
    assert main(["triage", str(first_step.root), "--json", str(file), "--limit", "6"]) == 0
    output = capsys.readouterr().out
    assert output.count("no mismatch in 6 rollouts") == 2
    content = json.loads(file.read_text())
    assert content["agrees"] is True
    assert content["num_rollouts"] == 6
    assert content["parties"]["trainer"]["causes"] == []


def test_status_1_with_one(first_step, policies, tmp_path, capsys):
    run = first_step.copy(tmp_path / "run")
    run.rewrite(lambda row: {"logprob_old": [-1.0, *row["logprob_old"][:-1]]})
    file = tmp_path / "triage.json"
    arguments = ["--other-policy", str(policies[1]), "--json", str(file)]
    assert main(["triage", str(run.file), *arguments]) == 1
    output = capsys.readouterr().out
    assert "trainer, which should have version 0" in output
    assert "MISMATCH, cause: token ids" in output
    assert max(map(len, output.splitlines())) <= 120
    tested = json.loads(file.read_text())["parties"]["trainer"]["tested"]
    assert {"token ids", "pixels", "mRoPE positions", "weights"} <= {row["cause"] for row in tested}
    assert len(tested) > 30
    gaps = [row["mean"] for row in tested[2:]]
    assert gaps == sorted(gaps)


def test_status_2_for_what_cannot_be_read(first_step, tmp_path, capsys):
    assert main(["triage", str(tmp_path / "absent")]) == 2
    assert "error: these are no rollouts of a run" in capsys.readouterr().err
    assert main(["triage", str(first_step.root), "--json", str(tmp_path / "no" / "file.json")]) == 2
    assert "create it first" in capsys.readouterr().err
