"""How an update scales over processes: `python benchmarks/scaling.py [--quick] [--json FILE]`.

**Weak scaling.** 1, 2 and 4 data-parallel processes of one thread on gloo, one question each: forward, backward, the
exchange of gradients and the optimizer (its state sharded over the ranks). An ideal update takes as long as with one
process, where there is a core for each, and proportionally longer where there is not.

**Pipeline.** Two stages, without and with interleaved model chunks, on more and more micro-batches of one size. From
the first forward pass of any stage to the last backward pass of any, a stage is in a forward or backward pass, or it
waits (for the other stage, or for messages). By theory it waits (p - 1) / (v · m + p - 1) of that time, with p equal
stages, v chunks and m micro-batches (Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM, section 2.2).

Each row is the median over rounds of fresh jobs, and in each of them over several updates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import THREADS, Row, make_row, report

from perl_megatron.runtime import environment

environment.prepare_process()

from perl_megatron.runtime import platform  # noqa: E402

platform.install()  # before anything imports megatron-core or transformers

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from group_step_cases import Case, Shape, make_encoder, make_group, write_case  # noqa: E402
from megatron.core.pipeline_parallel import schedules  # noqa: E402

from perl_megatron.config.schema import Config  # noqa: E402
from perl_megatron.runtime import topology  # noqa: E402
from perl_megatron.train.actor import Actor  # noqa: E402

SHAPE = Shape(256, 1376, 4, 8, 160, 428, 4, 2, (1,), 2000, kv_heads=2)
"""Two stages of four language layers; the vision tower and the output layer are small, so that stages are alike."""
WEAK = Case(SHAPE, images=2, response=96, rollouts=3, side=168)
PIPELINE = Case(SHAPE, images=1, response=256, rollouts=1, copies=0, side=56)
"""One sequence, which is one micro-batch, of a question."""
TINY = Shape(64, 96, 2, 4, 32, 48, 2, 2, (1,), 1000)
WHOLE_QUESTION, ONE_VIEW = 10**9, 1


@dataclass(frozen=True)
class Job:
    """One layout and what it computes."""

    case: Case
    questions: int
    data: int = 1
    pipeline: int = 1
    chunks: int = 1

    @property
    def name(self) -> str:
        """The same for jobs that do the same."""
        layout = f"data {self.data}" if self.pipeline == 1 else f"pipeline {self.pipeline}, chunks {self.chunks}"
        return f"{layout}, questions {self.questions}"

    @property
    def processes(self) -> int:
        """Of one thread each."""
        return self.data * self.pipeline


def jobs(quick: bool) -> dict[str, Job]:
    """All of them; the quick ones are tiny and show only that it runs."""
    weak = Case(TINY, 2, 5, rollouts=2, side=56) if quick else WEAK
    pipe = Case(TINY, 1, 5, rollouts=1, copies=0, side=56) if quick else PIPELINE
    found = [Job(weak, size, data=size) for size in ((1, 2) if quick else (1, 2, 4))]
    for chunks in (1,) if quick else (1, 2):
        for number in (4,) if quick else (2, 4, 8, 16):
            found.append(Job(pipe, number, pipeline=2, chunks=chunks))
    return {job.name: job for job in found}


class StageClock:
    """When this rank is in a forward or backward pass of the schedules of megatron-core."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        for name in ("forward_step", "backward_step"):
            setattr(schedules, name, self._timed(getattr(schedules, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._spans.append((begin, time.perf_counter()))

        return timed

    def take(self) -> list[tuple[float, float]]:
        """(begin, end) of each pass since the last call, by a clock that a machine's processes share."""
        spans, self._spans = self._spans, []
        return spans


def share_of_waiting(spans: Sequence[Sequence[tuple[float, float]]]) -> float:
    """What the mean rank waits of the time from the first begin to the last end; ``spans``: each rank's."""
    begin, end = (
        min(begin for of_rank in spans for begin, _ in of_rank),
        max(end for of_rank in spans for _, end in of_rank),
    )
    busy = sum(end - begin for of_rank in spans for begin, end in of_rank)
    return 1 - busy / (len(spans) * (end - begin))


def work(job: Job, folder: Path, repeats: int) -> dict[str, float] | None:
    """Be one rank; rank 0 gives the medians of an update (seconds, share of waiting) after one that warms up."""
    config = Config.model_validate(
        {
            "model": {"path": folder / "policy", "dtype": "float32"},
            "algorithm": {"kl_coefficient": 0.0},
            "actor": {"micro_batch_tokens": ONE_VIEW if job.pipeline > 1 else WHOLE_QUESTION},
            "parallel": {"data": job.data, "pipeline": job.pipeline, "virtual_pipeline": job.chunks},
        }
    )
    place = topology.initialize(config.parallel, seed=0, timeout_seconds=600)
    torch.set_num_threads(1)  # not the product's share of the cores: that of one process alone is all of them
    clock = StageClock()
    encoder = make_encoder(folder)
    sequences = [one for number in range(job.questions) for one in make_group(job.case, folder, encoder, number)]
    actor = Actor(config, place, encoder, total_steps=repeats + 1)
    seconds, waiting = [], []
    for _ in range(repeats + 1):
        dist.barrier()
        begin = time.perf_counter()
        actor.update(sequences)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
        spans: list[Any] = [None] * place.world_size
        dist.all_gather_object(spans, clock.take())
        waiting.append(share_of_waiting(spans))
    topology.shutdown()
    medians = {"seconds": statistics.median(seconds[1:]), "waiting": statistics.median(waiting[1:])}
    return medians if place.rank == 0 else None


def run(name: str, job: Job, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """What ``work`` measured, in a job that is started for it."""
    script = [str(Path(__file__)), "--worker", name, "--folder", str(folder), "--repeats", str(options.repeats)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes)]
    command = [sys.executable, *(torchrun if job.processes > 1 else []), *script]
    found = subprocess.run(
        [*command, *(["--quick"] if options.quick else [])],
        capture_output=True,
        text=True,
        env=os.environ | dict.fromkeys(THREADS, "1"),
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"{name} failed:\n{found.stderr[-5000:]}")
    (line,) = [line for line in found.stdout.splitlines() if line.startswith('{"seconds"')]
    return json.loads(line)


def rows_of(measured: dict[str, list[dict[str, float]]], all_jobs: dict[str, Job], cores: int) -> list[Row]:
    """Weak scaling against the ideal, and waiting against theory."""
    rows = []
    seconds = {name: [one["seconds"] for one in of_job] for name, of_job in measured.items()}
    alone = next(seconds[name] for name, job in all_jobs.items() if job.processes == 1)
    for name, job in all_jobs.items():
        if job.pipeline == 1 and job.data > 1:
            ideal = [value * max(1.0, job.data / cores) for value in alone]
            rows.append(make_row(f"weak scaling, {name}: an update", seconds[name], "ideal", ideal, "s", None))
        elif job.pipeline > 1:
            waiting = [one["waiting"] for one in measured[name]]
            theory = [bubble(job.pipeline, job.chunks, job.questions)] * len(waiting)
            case = f"pipeline {job.pipeline}, chunks {job.chunks}, micro-batches {job.questions}: share of waiting"
            rows.append(make_row(case, waiting, "theory", theory, "of an update", None))
    return rows


def bubble(stages: int, chunks: int, micro_batches: int) -> float:
    """The share of an update in which a stage waits, by theory."""
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="tiny cases, one round: shows that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="fresh jobs of each case")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates of a job")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    all_jobs = jobs(options.quick)
    if options.worker:
        found = work(all_jobs[options.worker], options.folder, options.repeats)
        if found is not None:
            print(json.dumps(found), flush=True)
        return
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in all_jobs}
    with tempfile.TemporaryDirectory() as place:
        folders: dict[Case, Path] = {}
        for job in all_jobs.values():
            if job.case not in folders:
                folders[job.case] = Path(place, str(len(folders)))
                folders[job.case].mkdir()
                most = max(other.questions for other in all_jobs.values() if other.case == job.case)
                write_case(job.case, folders[job.case], questions=most)
        for number in range(1 if options.quick else options.rounds):
            # Who goes first changes, so that a machine that slows down or warms up favours nobody.
            for name in list(all_jobs)[:: 1 if number % 2 == 0 else -1]:
                measured[name].append(run(name, all_jobs[name], folders[all_jobs[name].case], options))
    for name, of_job in measured.items():
        print(f"{name}: {statistics.median(one['seconds'] for one in of_job):.3g} s")
    cores = len(os.sched_getaffinity(0))
    report(f"an update over processes of one thread, {cores} cores", rows_of(measured, all_jobs, cores), options.json)


if __name__ == "__main__":
    main()
