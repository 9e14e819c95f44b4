"""What a checkpoint costs a step: `python benchmarks/checkpoint_overhead.py [--quick] [--rounds N] [--json FILE]`.

Real runs of `perl-megatron train` at the demo's settings (16 questions × 2 orders × 6 responses, two tensor-parallel
processes, a checkpoint every 10 steps), by the embedded engine, on a policy with random weights; every group is kept,
so that all steps have the same work. The peer writes no checkpoint before its end.

The bound is on what checkpoints take from the training, per step: the seconds in which it stands still, and the
processor time of the writing beside it as if all of that were lost, over a step's seconds. The rows of whole steps
have the same in them, and the machine's noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_run import REPOSITORY, metrics_of_run
from side_by_side import Row, make_row, report, run_in_turn

SAVE_EVERY = 10
LIMIT = 1.02
"""A step with its share of a checkpoint, over one without."""
SETTINGS = {
    "asynchronous": (),
    "synchronous": ("run.asynchronous_checkpoints=false",),
    "no checkpoints": ("run.save_every=0",),
}
QUICK = ("parallel.tensor=1", "rollout.questions_per_step=2", "rollout.num_rollouts=2", "run.save_every=2")
QUICK_STEPS = 4


def prepare(folder: Path) -> None:
    """A policy and questions, as the demo's."""
    data = [str(folder / "data"), "--recipe", "examples/demo/digits.yaml"]
    policy = [str(folder / "policy"), "--init-std", "0.08"]
    for tool, arguments in (("make_digits.py", data), ("make_tiny_policy.py", policy)):
        subprocess.run([sys.executable, f"tools/{tool}", *arguments], cwd=REPOSITORY, check=True, capture_output=True)
    records = (folder / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "data" / "train.jsonl").write_text("".join(records[:200]))  # all are read at the start


def work(name: str, folder: Path, *, quick: bool) -> dict[str, list[float]]:
    """One run; numbers of its steps but for the first, which warms up."""
    settings = [
        *(f"run.steps={QUICK_STEPS if quick else 2 * SAVE_EVERY + 2}", f"run.save_every={SAVE_EVERY}"),
        *(*(QUICK if quick else ()), *SETTINGS[name]),
        *(f"model.path={folder / 'policy'}", f"data.train={folder / 'data' / 'train.jsonl'}"),
        *("data.evaluation=null", "rollout.engine=embedded", "filter.no_signal=false"),
    ]
    rows = [row for row in metrics_of_run(settings, folder) if row["step"] > 1]
    names = ("seconds/step", "seconds/save", "save/background_seconds", "save/background_cpu_seconds")
    return {name: [row[name] for row in rows if name in row] for name in names}


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    plain = [mean for run in found["no checkpoints"] for mean in [statistics.mean(run["seconds/step"])]]
    step = statistics.median([seconds for run in found["no checkpoints"] for seconds in run["seconds/step"]])
    rows = []
    for name in ("asynchronous", "synchronous"):
        held = [seconds for run in found[name] for seconds in run["seconds/save"]]
        beside = [seconds for run in found[name] for seconds in run["save/background_cpu_seconds"]] or [0.0]
        lost = [step + (seconds + statistics.median(beside)) / SAVE_EVERY for seconds in held]
        goal = LIMIT if name == "asynchronous" else None
        rows.append(make_row(f"{name}: a step with what it loses", lost, "no checkpoints", [step], "s", goal))
        whole = [statistics.mean(run["seconds/step"]) for run in found[name]]
        rows.append(make_row(f"{name}: whole steps, mean", whole, "no checkpoints", plain, "s", None))
    first, second = (
        [seconds for run in found[name] for seconds in run["seconds/save"]] for name in ("asynchronous", "synchronous")
    )
    rows.append(make_row("training stands still for a checkpoint", first, "synchronous", second, "s", None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of few small steps; its numbers mean little")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=list(SETTINGS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.folder, quick=options.quick)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        arguments = ["--folder", folder, *(["--quick"] if options.quick else [])]
        rounds = 1 if options.quick else options.rounds
        found = run_in_turn(Path(__file__), list(SETTINGS), arguments, rounds=rounds, threads=1)
    report("Checkpoints at the demo's settings", rows_of(found), options.json)


if __name__ == "__main__":
    main()
