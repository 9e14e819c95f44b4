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


def specify(job: SmallJob, folder: Path, *overrides: str) -> Path:
    """What the programs that fork ranks are told."""
    data = (f"data.train={few(job, 'train.jsonl', 36)}", f"data.evaluation={few(job, 'heldout.jsonl', 6)}")
    argv = job.command("train", "train.yaml", *SETTINGS, f"run.directory={folder / 'runs'}", *data, *overrides)[3:]
    content = {"argv": argv, "runs": str(folder / "runs"), "num_ranks": 2, "num_kills": NUM_KILLS, "seed": SEED}
    specification = folder / "specification.json"
    specification.write_text(json.dumps(content))
    return specification


def run(program: str, *arguments: str | Path) -> dict:
    """The last line that a program beside this file prints."""
    result = call([sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)], timeout=1100)
    print(result.stderr[-5000:])
    assert result.returncode == 0, result.stdout + result.stderr[-20000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_killed_at_random_moments_and_resumed_is_bit_for_bit(job: SmallJob, tmp_path: Path) -> None:
    """Weights, optimizer, schedule, cursor, carried groups, ledger, metrics, records, evaluations: all are compared.

    On two ranks, until the questions of an epoch are used up; then the same once more, resumed on one rank.
    """
    print(f"seed {SEED}")
    found = run("kill_campaign.py", specify(job, tmp_path))
    assert len(found["kills"]) >= NUM_KILLS
    places = {phase for kill in found["kills"] for phase in kill["phases"]}
    assert {"generate", "log_probs", "update", "evaluate", "export", "between phases"} <= places
    assert sum(kill["writing"] or "save" in kill["phases"] for kill in found["kills"]) >= 4


def test_a_rank_that_stalls_ends_the_job(job: SmallJob, tmp_path: Path) -> None:
    found = run("broken_ranks.py", specify(job, tmp_path, "deadlines.update=10"), "stalls")
    assert found["statuses"] == [1, 1]
    assert found["seconds"] < 10 + 90  # on a machine that may be busy; the rank would go on after 300
    output = found["output"]
    assert "phase 'update' took longer than deadlines.update = 10 s" in output
    assert "ranks that the others wait for: 1\n" in output
    assert "in stall_here" in output
    assert "rank 0: in phase 'update'" in output
    assert "all_reduce" in output


@pytest.mark.parametrize(
    ("fault", "differs"),
    [
        ("other_rewards", ("phase 'log_probs'", "  reward: ")),
        ("skips_a_save", ('  phase: "save" on rank 0; "whether to stop" on rank 1',)),
    ],
)
def test_ranks_that_diverge_are_told_so(job: SmallJob, tmp_path: Path, fault: str, differs: tuple[str, ...]) -> None:
    found = run("broken_ranks.py", specify(job, tmp_path), fault)
    assert found["statuses"] == [70, 70]
    assert "DivergedError: the ranks have diverged:" in found["output"]
    for text in differs:
        assert text in found["output"]
    assert "token_digest" not in found["output"]


def test_a_full_disk_costs_no_checkpoint_and_not_the_run(job: SmallJob, tmp_path: Path) -> None:
    """The limit on the size of files stands for it: writing fails in the same place, with an error of its kind."""
    found = run("broken_ranks.py", specify(job, tmp_path), "disk_full")
    assert found["good"][-1] >= found["before"]
    assert found["statuses"] == [0, 0]
    assert "cannot write the checkpoint: File too large" in found["output"]
    assert "free some space there" in found["output"]
    assert "the run goes on, and saves again when it is due" in found["output"]
    assert found["ends"] == [2, 2]
    assert "cannot write the checkpoint: File too large" in found["end"]
    assert found["last"]
