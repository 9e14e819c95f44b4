"""Runs a job, kills it at random moments until it was killed often enough, and compares what is left each time.

`python kill_campaign.py SPECIFICATION.json`: prints one JSON line, for every kill where the ranks were.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from warm_ranks import PHASES, WarmRanks

TIMES = ("time", "seconds/", "memory/", "throughput/", "sync/seconds", "sync/attest_seconds", "save/", "data/")
ANY_TIME, START, WRITING = "any time", "start", "writing"
LONGEST = 300.0
"""Seconds that an attempt may take; far more than any does."""
TRIES = 4
"""So often a place is aimed at, at most: a short one may be over before the kill comes."""


@dataclass(frozen=True)
class Specification:
    """What is to be done."""

    argv: list[str]
    """Of `perl-megatron train`, without the run's name."""
    runs: Path
    """run.directory."""
    num_ranks: int
    num_kills: int
    seed: int


@dataclass(frozen=True)
class Kill:
    """Where the ranks were, when they were killed."""

    target: str
    phases: list[str]
    """Of each rank, or "between phases"."""
    writing: bool
    """Whether any of them was writing a checkpoint in the background."""

    def hit(self) -> bool:
        """Whether it came where it was meant to come."""
        if self.target in (START, ANY_TIME):
            return True
        return self.writing if self.target == WRITING else self.target in self.phases


def main() -> None:
    content = json.loads(Path(sys.argv[1]).read_text())
    job = Specification(**{**content, "runs": Path(content["runs"])})
    statuses = attempt(job, "whole").wait(LONGEST)
    assert statuses == [0] * job.num_ranks, (statuses, log_of(job, "whole").read_text())
    expected = what_is_left(job.runs / "whole")
    randomness, kills, number = random.Random(job.seed), list[Kill](), 0
    # Every place at least twice, the rest whenever it comes.
    targets = [*PHASES, WRITING, WRITING, START] * 2
    targets += [ANY_TIME] * (job.num_kills - len(targets))
    randomness.shuffle(targets)
    while targets:
        name = f"killed-{number}"
        number += 1
        kill_until_it_ends(job, name, targets, randomness, kills)
        compare(what_is_left(job.runs / name), expected, name)
    resize(job, expected)
    print(json.dumps({"kills": [asdict(kill) for kill in kills], "runs": number}))


def resize(job: Specification, expected: dict[str, Any]) -> None:
    """Killed after two steps, and gone on with by one rank alone: the same but for the order of sums."""
    name = "resized"
    ranks = attempt(job, name)
    while not (job.runs / name / "checkpoints" / "step-00000002").is_dir():
        assert ranks.running(), log_of(job, name).read_text()[-5000:]
        time.sleep(0.0005)
    ranks.kill()
    assert attempt(job, name, num_ranks=1).wait(LONGEST) == [0], log_of(job, name).read_text()[-5000:]
    left = rows(job.runs / name / "metrics.jsonl")
    assert [row["step"] for row in left] == [row["step"] for row in expected["metrics"]]
    for row, other in zip(left, expected["metrics"], strict=True):
        # Each rank's engine has a cache of its own, so its hits depend on the number of ranks.
        alike = [key for key in other if not key.startswith("rollout/")]
        far = [key for key in alike if not math.isclose(row[key], other[key], rel_tol=1e-3, abs_tol=1e-5)]
        assert not far, (row["step"], {key: (row[key], other[key]) for key in far})


def kill_until_it_ends(
    job: Specification, name: str, targets: list[str], randomness: random.Random, kills: list[Kill]
) -> None:
    missed = 0
    while True:
        ranks, start = attempt(job, name), time.monotonic()
        if targets and wait_for(targets[-1], ranks, randomness, longest=0.0 if missed else 0.03):
            phases = [ranks.phase(rank) or "between phases" for rank in range(job.num_ranks)]
            kill = Kill(targets[-1], phases, any(ranks.writes(rank) for rank in range(job.num_ranks)))
            ranks.kill(first=randomness.randrange(job.num_ranks), pause=randomness.choice([0, 0, 0.02]))
            kills.append(kill)
            print(f"{name}: {kill} after {time.monotonic() - start:.1f} s", file=sys.stderr)
            missed = 0 if kill.hit() else missed + 1
            if missed in (0, TRIES):
                targets.pop()
                missed = 0
            continue
        statuses = ranks.wait(LONGEST)
        assert statuses == [0] * job.num_ranks, (statuses, log_of(job, name).read_text()[-5000:])
        return


def wait_for(target: str, ranks: WarmRanks, randomness: random.Random, longest: float) -> bool:
    """Until a rank is at the place and a random while longer, up to ``longest``; False where they end before."""
    if target in (START, ANY_TIME):
        end = time.monotonic() + randomness.uniform(0, 1.0 if target == START else 8.0)
        while time.monotonic() < end and ranks.running():
            time.sleep(0.001)
        return ranks.running()
    rank, times = randomness.randrange(len(ranks.pids)), randomness.choice([1, 1, 2])
    for number in range(times):
        while not at(target, ranks, rank):
            if not ranks.running():
                return False
            time.sleep(0.0005)
        while number + 1 < times and at(target, ranks, rank) and ranks.running():
            time.sleep(0.0005)
    time.sleep(randomness.uniform(0, longest))
    return ranks.running()


def at(target: str, ranks: WarmRanks, rank: int) -> bool:
    return ranks.writes(rank) if target == WRITING else ranks.phase(rank) == target


def attempt(job: Specification, name: str, num_ranks: int | None = None) -> WarmRanks:
    """Start the run, or go on with it."""
    resume = ["--resume"] if (job.runs / name).exists() else []
    argv = [*job.argv, f"run.name={name}", *resume]
    return WarmRanks(argv, num_ranks=num_ranks or job.num_ranks, log=log_of(job, name))


def log_of(job: Specification, name: str) -> Path:
    job.runs.mkdir(parents=True, exist_ok=True)
    return job.runs.with_name(f"{name}.log")


def what_is_left(run: Path) -> dict[str, Any]:
    """All that a run leaves, without what depends on the clock."""
    last = max((run / "checkpoints").glob("step-*"))
    state = json.loads((last / "training_state.json").read_text())
    del state["extra"]["seconds"]
    files = [*sorted(last.glob("*.distcp")), *sorted((run / "export").glob("*"))]
    texts = [run / "groups.jsonl", *sorted((run / "rollouts").glob("*.jsonl"))]
    texts += sorted((run / "evaluations").glob("*.jsonl"))
    return {
        "metrics": rows(run / "metrics.jsonl"),
        "state": state,
        "images": sorted(path.name for path in (run / "rollouts" / "images").iterdir()),
        **{str(path.relative_to(run)): path.read_bytes() for path in files},
        **{str(path.relative_to(run)): path.read_text() for path in texts},
    }


def rows(metrics: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in found]


def compare(left: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert left.keys() == expected.keys(), f"{name}: {left.keys() ^ expected.keys()}"
    differing = [key for key in expected if left[key] != expected[key]]
    assert not differing, f"{name} differs from the run that was not killed in {differing}"


if __name__ == "__main__":
    main()
