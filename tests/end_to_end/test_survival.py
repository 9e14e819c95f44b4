"""A run that is killed, at any moment and as often as it happens, ends as one that was not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small_job import SMALL, SmallJob, call

pytestmark = pytest.mark.slow
SETTINGS = (
    *SMALL,
    *("run.steps=6", "run.save_every=1", "data.epochs=1", "evaluation.every=2", "run.keep_best=evaluation/accuracy"),
    *("rollout.engine=embedded", "parallel.tensor=1", "filter.carry_surplus=true", "filter.oversample=2"),
    "algorithm.importance_correction=truncated",
)
NUM_KILLS, SEED = 25, 20261128


def few(job: SmallJob, name: str, count: int) -> Path:
    """The first records of a file of the job's: every attempt reads and checks all of them."""
    path = job.data / f"first-{count}-{name}"
    path.write_text("".join((job.data / name).read_text().splitlines(keepends=True)[:count]))
    return path


def test_killed_at_random_moments_and_resumed_is_bit_for_bit(job: SmallJob, tmp_path: Path) -> None:
    """Weights, optimizer, schedule, cursor, carried groups, ledger, metrics, records, evaluations: all are compared.

    On two ranks, until the questions of an epoch are used up; then the same once more, resumed on one rank.
    """
    data = (f"data.train={few(job, 'train.jsonl', 36)}", f"data.evaluation={few(job, 'heldout.jsonl', 6)}")
    argv = job.command("train", "train.yaml", *SETTINGS, f"run.directory={tmp_path / 'runs'}", *data)[3:]
    specification = tmp_path / "specification.json"
    content = {"argv": argv, "runs": str(tmp_path / "runs"), "num_ranks": 2, "num_kills": NUM_KILLS, "seed": SEED}
    specification.write_text(json.dumps(content))
    print(f"seed {SEED}")
    result = call([sys.executable, str(Path(__file__).with_name("kill_campaign.py")), str(specification)])
    print(result.stderr[-5000:])
    assert result.returncode == 0, result.stdout + result.stderr[-20000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kills"] >= NUM_KILLS
    places = {hit.split(": ")[1] for hit in found["hits"]}
    assert {"generate", "log_probs", "update", "save", "evaluate", "export", "between phases"} <= places
    assert sum(count for hit, count in found["hits"].items() if hit.startswith(("writing", "save"))) >= 4
