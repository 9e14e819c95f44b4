"""Jobs in which one rank, or the disk, does not do what it should. The faults are made from outside of the product.

`python broken_ranks.py SPECIFICATION.json FAULT` prints one JSON line: exit statuses, seconds from the fault to the
end, and the ranks' output.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_campaign import LONGEST, Specification, attempt, compare, log_of, what_is_left
from warm_ranks import WarmRanks

import perl_megatron.collect
from perl_megatron.train.actor import Actor
from perl_megatron.training_session import TrainingSession

FULL = 1_000_000
"""Bytes that a file may have while the disk is full: enough for the run's logs, and for no part of a checkpoint."""


def stalls(rank: int) -> None:
    """Rank 1 never gets to its second update."""
    update, calls = Actor.update, []

    def stall_here(actor: Actor, sequences: Any) -> dict[str, float]:
        calls.append(time.time())
        if rank == 1 and len(calls) == 2:
            note_fault()
            time.sleep(LONGEST)
        return update(actor, sequences)

    Actor.update = stall_here  # type: ignore[method-assign]


def other_rewards(rank: int) -> None:
    """Rank 1 counts one more for every response."""
    total = perl_megatron.collect.total
    note_fault()
    if rank == 1:
        perl_megatron.collect.total = lambda parts, reward: total(parts, reward) + 1


def skips_a_save(rank: int) -> None:
    """Rank 1 goes on where the others save."""
    note_fault()
    if rank == 1:
        TrainingSession.save_if_due = lambda session, step: None  # type: ignore[method-assign]


def note_fault() -> None:
    Path(sys.argv[1]).with_name("fault").touch()


FAULTS: dict[str, Callable[[int], None]] = {
    "stalls": stalls,
    "other_rewards": other_rewards,
    "skips_a_save": skips_a_save,
}


def main() -> None:
    content, fault = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    job = Specification(**{**content, "runs": Path(content["runs"])})
    found = fill_the_disk(job) if fault == "disk_full" else break_a_rank(job, fault)
    print(json.dumps(found))


def break_a_rank(job: Specification, fault: str) -> dict[str, Any]:
    log_of(job, fault).unlink(missing_ok=True)
    argv = [*job.argv, f"run.name={fault}"]
    ranks = WarmRanks(argv, num_ranks=job.num_ranks, log=log_of(job, fault), prepare=FAULTS[fault])
    statuses = ranks.wait(LONGEST)
    seconds = time.time() - Path(sys.argv[1]).with_name("fault").stat().st_mtime
    return {"statuses": statuses, "seconds": seconds, "output": log_of(job, fault).read_text()}


def fill_the_disk(job: Specification) -> dict[str, Any]:
    """After the first checkpoint no more fits on the disk, for one of the next; then there is space again."""
    assert attempt(job, "whole").wait(LONGEST) == [0] * job.num_ranks
    ranks, checkpoints = attempt(job, "full"), job.runs / "full" / "checkpoints"
    wait_until((checkpoints / "step-00000001").is_dir, ranks)
    before = max(path.name for path in checkpoints.glob("step-*"))
    limit(ranks, FULL)
    wait_until(lambda: "A checkpoint failed" in log_of(job, "full").read_text(), ranks)
    good = sorted(path.name for path in checkpoints.glob("step-*"))
    # It leaves nothing behind; the next one may be in the works already, and fails too.
    wait_until(lambda: not list(checkpoints.glob(".incomplete*")), ranks)
    limit(ranks, resource.RLIM_INFINITY)
    statuses = ranks.wait(LONGEST)
    compare(what_is_left(job.runs / "full"), what_is_left(job.runs / "whole"), "full")
    # And a run that has no space at its end.
    ranks, checkpoints = attempt(job, "full-to-the-end"), job.runs / "full-to-the-end" / "checkpoints"
    wait_until((checkpoints / "step-00000001").is_dir, ranks)
    limit(ranks, FULL)
    ends = ranks.wait(LONGEST)
    return {
        "statuses": statuses,
        "before": before,
        "good": good,
        "output": log_of(job, "full").read_text(),
        "ends": ends,
        "end": log_of(job, "full-to-the-end").read_text(),
        "last": sorted(path.name for path in checkpoints.glob("step-*")),
    }


def limit(ranks: WarmRanks, num_bytes: int) -> None:
    """How large the files of the ranks may become; writing beyond is an error, as on a full disk."""
    for pid in ranks.pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def wait_until(condition: Callable[[], bool], ranks: WarmRanks) -> None:
    while not condition():
        assert ranks.running(), ranks.statuses
        time.sleep(0.001)


if __name__ == "__main__":
    assert os.environ.get("OMP_NUM_THREADS") == "1"
    main()
