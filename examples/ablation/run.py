"""Run the ablation: `python examples/ablation/run.py [--seeds 5] [--parallel 2]` (from the repository's root).

Every arm of `arms.yaml` with every seed; an arm's run and another's with the same seed share data and warm start, so
they are compared in pairs. A run that is there is not run again, and one that was interrupted is begun again. Then
`python examples/ablation/table.py` makes the table and the plot.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import yaml

HERE = Path(__file__).parent
RUNS = Path("runs/ablation")


def read_arms() -> dict[str, list[str]]:
    """Name → overrides."""
    return yaml.safe_load((HERE / "arms.yaml").read_text())


def run_name(arm: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{re.sub('[^a-z0-9]+', '-', arm.lower()).strip('-')}-seed-{seed}"


def command(arm: str, overrides: Sequence[str], seed: int) -> list[str]:
    """Trains one arm with one seed."""
    start = Path(f"runs/demo-start-{seed}")
    return [
        *("perl-megatron", "train", str(HERE / "ablation.yaml"), f"run.name={run_name(arm, seed)}"),
        *(f"run.seed={seed}", f"model.path={start / 'warm_start/export'}"),
        *(f"data.train={start / 'data/train.jsonl'}", f"data.evaluation={start / 'data/heldout.jsonl'}"),
        *overrides,
    ]


def run_one(arm: str, overrides: Sequence[str], seed: int, cores: SimpleQueue[set[int]]) -> bool:
    """Whether the run is there afterwards; its output goes to a file beside its folder."""
    folder = RUNS / run_name(arm, seed)
    if (folder / "summary.json").is_file():
        return True
    shutil.rmtree(folder, ignore_errors=True)
    mine, begin = cores.get(), time.monotonic()
    try:
        with folder.with_suffix(".log").open("w") as log:
            # A run uses as many threads as it may have cores.
            result = subprocess.run(
                command(arm, overrides, seed),
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,  # a failure is reported, and the other runs go on
                preexec_fn=lambda: os.sched_setaffinity(0, mine),
            )
    finally:
        cores.put(mine)
    outcome = "done" if result.returncode == 0 else f"FAILED ({result.returncode}), see {log.name}"
    print(f"{arm}, seed {seed}: {outcome} after {time.monotonic() - begin:.0f} s", flush=True)
    return result.returncode == 0


def main() -> int:
    """Prepare every seed, then run all arms of one seed after the other's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=5, help="the seeds 0 … N - 1")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    parser.add_argument("--arms", help="only those whose name holds this text")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all arms")
    options = parser.parse_args()
    arms = {name: overrides for name, overrides in read_arms().items() if options.arms is None or options.arms in name}
    RUNS.mkdir(parents=True, exist_ok=True)
    available = sorted(os.sched_getaffinity(0))
    cores: SimpleQueue[set[int]] = SimpleQueue()
    for number in range(options.parallel):
        cores.put(set(available[number :: options.parallel]) or {available[number % len(available)]})
    succeeded = []
    for seed in range(options.seeds):
        subprocess.run(["sh", "examples/demo/prepare.sh", str(seed)], check=True)
        with ThreadPoolExecutor(options.parallel) as pool:
            runs = [pool.submit(run_one, arm, [*own, *options.overrides], seed, cores) for arm, own in arms.items()]
            succeeded += [run.result() for run in runs]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
