"""One-step-off training against on-policy: `python benchmarks/overlap.py [--quick] [--rounds N] [--json FILE]`.

The demo's questions and a tiny policy; a rollout server on one core, the trainer on another, in turn with
`rollout.max_staleness` 1 and 0: seconds of a step, after the first two. On-policy, each core waits for the other one;
the most that overlap can save is the shorter of generation and update. Also says what share of a step the weights take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from served_server import running_server
from side_by_side import Row, make_row, report

from perl_megatron.launch.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
OVERLAP_GOAL = 1.0
WARM_UP = 2
"""Steps that are left out: the first compiles and warms up, and one step off has nothing under way before it."""


def prepare(folder: Path, questions: int) -> list[str]:
    """Data and a policy with random weights; the settings of a run on them."""
    for command in (
        ["tools/make_digits.py", folder / "data", "--recipe", "examples/demo/digits.yaml"],
        ["tools/make_tiny_policy.py", folder / "policy", "--layers", "4", "--intermediate", "256", "--tie"],
    ):
        subprocess.run([sys.executable, *map(str, command)], cwd=REPOSITORY, check=True, capture_output=True)
    return [
        *(f"run.directory={folder / 'runs'}", f"model.path={folder / 'policy'}"),
        *(f"data.train={folder / 'data' / 'train.jsonl'}", "data.evaluation=null", "filter.no_signal=false"),
        *("parallel.tensor=1", f"rollout.questions_per_step={questions}", "rollout.max_response_tokens=40"),
        *("algorithm.old_policy=engine", "run.save_every=0", "run.record_rollouts=false"),
    ]


def command(name: str, settings: list[str], *options: str, core: int) -> list[str]:
    """`perl-megatron NAME` with the demo's config, on one core."""
    pinned = ["taskset", "--cpu-list", str(core), sys.executable, "-m", "perl_megatron"]
    return [*pinned, name, str(REPOSITORY / "examples/demo/train.yaml"), *settings, *options]


def run(folder: Path, name: str, settings: list[str], core: int) -> list[dict[str, float]]:
    """The logged steps of a run after the warm-up."""
    line = command("train", [*settings, f"run.name={name}"], core=core)
    result = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, env=_environment(), check=False)
    if result.returncode:
        raise SystemExit(f"run {name} failed:\n{result.stdout[-2000:]}{result.stderr[-3000:]}")
    rows = [json.loads(row) for row in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row][WARM_UP:]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def rows_of(ahead: list[list[dict[str, float]]], on_policy: list[list[dict[str, float]]]) -> list[Row]:
    """Seconds of a step and its parts, a value for each round."""

    def medians(runs: list[list[dict[str, float]]], *names: str) -> list[float]:
        return [statistics.median(sum(row[name] for name in names) for row in run) for run in runs]

    step = medians(on_policy, "seconds/step")
    rows = [make_row("a step, one step off", medians(ahead, "seconds/step"), "on-policy", step, "s", OVERLAP_GOAL)]
    for name, label in (("generate", "waiting for rollouts"), ("update", "update"), ("sync", "weights")):
        row = (f"{label}, one step off", medians(ahead, f"seconds/{name}"), "on-policy")
        rows.append(make_row(*row, medians(on_policy, f"seconds/{name}"), "s", None))
    rows.append(make_row("weights, on-policy", medians(on_policy, "seconds/sync"), "the whole step", step, "s", None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few questions and steps, one round")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this needs two cores: one for the server, one for the trainer")
    kinds: dict[str, list[list[dict[str, float]]]] = {"ahead": [], "on_policy": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [*prepare(folder, 4 if options.quick else 16), f"run.steps={WARM_UP + (2 if options.quick else 8)}"]
        port = free_port()
        address, served = f"http://127.0.0.1:{port}", command("serve", settings, "--port", str(port), core=cores[0])
        settings += ["rollout.engine=server", f"rollout.servers={address}"]
        with running_server(served, address, folder / "server.log", _environment()):
            for number in range(1 if options.quick else options.rounds):
                # Who goes first changes, so that a machine that slows down or warms up favours nobody.
                for kind in list(kinds) if number % 2 == 0 else reversed(list(kinds)):
                    staleness = f"rollout.max_staleness={int(kind == 'ahead')}"
                    kinds[kind].append(run(folder, f"{kind}-{number}", [*settings, staleness], cores[1]))
    report("one core for the server, one for the trainer", rows_of(**kinds), options.json)


if __name__ == "__main__":
    main()
