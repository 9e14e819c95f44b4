"""A run whose numbers overflow: it ends by itself, names the batches, and `replay` says where it began."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from small_job import SmallJob, call


def test_a_run_that_overflows_ends_and_its_batch_is_replayed(job: SmallJob, tmp_path: Path) -> None:
    """A learning rate of 1e30 in two processes: the first update is applied, all later ones are not finite."""
    settings = (
        *("run.name=overflow", f"run.directory={tmp_path}", "run.save_every=1", "supervised.steps=20"),
        *("optimizer.learning_rate=1.0e+30", "optimizer.warmup_steps=0", "optimizer.max_skipped_updates=2"),
        "supervised.batch_size=8",
    )
    result = job.run("sft", "perception.yaml", *settings)
    assert result.returncode == 2, result.stdout + result.stderr
    run = tmp_path / "overflow"
    batches = sorted((run / "skipped").iterdir())
    assert [batch.name for batch in batches] == ["step-000002", "step-000003"]
    assert "2 updates in a row" in result.stderr
    assert all(str(batch) in result.stderr for batch in batches)
    assert "step 2: skipped an update (loss nan, gradient norm nan)" in result.stderr

    findings = tmp_path / "findings.json"
    command = [sys.executable, "-m", "perl_megatron", "replay", str(batches[0])]
    for layout in ((), ("parallel.data=1",)):
        replayed = call([*command, "--json", str(findings), *layout])
        assert replayed.returncode == 1, replayed.stdout + replayed.stderr
        assert "weights after 1 steps; the batch's own" in replayed.stdout
        content = json.loads(findings.read_text())
        assert content["loss"] == "nan"
        found = {finding["what"]: finding for finding in content["findings"]}
        assert found.keys() == {"module output", "log-probability", "sequence gradient", "parameter gradient"}
    # With the policy that training began with, the batch is as good as any.
    replayed = call([*command, "--json", str(findings), "--checkpoint", str(job.policy), "parallel.data=1"])
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert json.loads(findings.read_text())["finite"]
    assert "all numbers are finite" in replayed.stdout
    nowhere = call([*command[:-1], str(run / "skipped" / "step-000009")])
    assert nowhere.returncode == 2
    assert "there is no batch of a skipped update" in nowhere.stderr
