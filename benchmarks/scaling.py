"""How an update scales over processes: `python benchmarks/scaling.py [--quick] [--json FILE]`.

**Weak scaling.** 1, 2 and 4 data-parallel processes of one thread on gloo, one question each: forward, backward, the
exchange of gradients and the optimizer (its state sharded over the ranks). An ideal update takes as long as with one
process, where there is a core for each, and proportionally longer where there is not.

**Pipeline.** Two stages, without and with interleaved model chunks, on more and more micro-batches of one size. What a
micro-batch adds is taken from the two longest updates; what is over m times that is time in which a stage waits (and
what any update costs, which cannot be told apart here). By theory the share of an update that a stage waits is
(p - 1) / (v · m + p - 1), with p stages, v chunks and m micro-batches (Narayanan et al. 2021, Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM, section 2.2). Without the optimizer's step.

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
from dataclasses import dataclass
from pathlib import Path

from side_by_side import THREADS, Row, make_row, report

from perl_megatron.runtime import environment

environment.prepare_process()

from perl_megatron.runtime import platform  # noqa: E402

platform.install()  # before anything imports megatron-core or transformers

import torch.distributed as dist  # noqa: E402
from group_step import no_step  # noqa: E402
from group_step_cases import Case, Shape, make_encoder, make_group, write_case  # noqa: E402

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
    optimizer: bool = True
    """Whether the optimizer's step is part of it."""

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
        for number in (2, 4) if quick else (2, 4, 8, 16):
            found.append(Job(pipe, number, pipeline=2, chunks=chunks, optimizer=False))
    return {job.name: job for job in found}


def work(job: Job, folder: Path, repeats: int) -> dict[str, float] | None:
    """Be one rank; rank 0 gives the median seconds of an update after one that warms up."""
    config = Config.model_validate(
        {
            "model": {"path": folder / "policy", "dtype": "float32"},
            "algorithm": {"kl_coefficient": 0.0},
            "actor": {"micro_batch_tokens": ONE_VIEW if job.pipeline > 1 else WHOLE_QUESTION},
            "parallel": {"data": job.data, "pipeline": job.pipeline, "virtual_pipeline": job.chunks},
        }
    )
    place = topology.initialize(config.parallel, seed=0, timeout_seconds=600)
    platform.set_threads()
    encoder = make_encoder(folder)
    sequences = [one for number in range(job.questions) for one in make_group(job.case, folder, encoder, number)]
    actor = Actor(config, place, encoder, total_steps=repeats + 1)
    if not job.optimizer:
        actor.optimizer.step = no_step  # type: ignore[method-assign]
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        begin = time.perf_counter()
        actor.update(sequences)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    topology.shutdown()
    return {"seconds": statistics.median(seconds[1:])} if place.rank == 0 else None


def run(name: str, job: Job, folder: Path, options: argparse.Namespace) -> float:
    """Seconds of an update of a job that is started for it."""
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
    return float(json.loads(line)["seconds"])


def rows_of(seconds: dict[str, list[float]], all_jobs: dict[str, Job], cores: int) -> list[Row]:
    """Weak scaling against the ideal, and waiting against theory."""
    rows = []
    alone = next(seconds[name] for name, job in all_jobs.items() if job.processes == 1)
    for name, job in all_jobs.items():
        if job.pipeline == 1 and job.data > 1:
            ideal = [value * max(1.0, job.data / cores) for value in alone]
            rows.append(make_row(f"weak scaling, {name}: an update", seconds[name], "ideal", ideal, "s", None))
    for chunks in sorted({job.chunks for job in all_jobs.values() if job.pipeline > 1}):
        chosen = {
            job.questions: seconds[name] for name, job in all_jobs.items() if (job.pipeline, job.chunks) == (2, chunks)
        }
        number, longest = sorted(chosen)[-2:]
        each = [(b - a) / (longest - number) for a, b in zip(chosen[number], chosen[longest], strict=True)]
        for number, values in sorted(chosen.items()):
            waiting = [1 - number * one / whole for one, whole in zip(each, values, strict=True)]
            theory = bubble(2, chunks, number)
            case = f"pipeline 2, chunks {chunks}, micro-batches {number}: share of waiting"
            rows.append(make_row(case, waiting, "theory", [theory] * len(waiting), "of an update", None))
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
    seconds: dict[str, list[float]] = {name: [] for name in all_jobs}
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
                seconds[name].append(run(name, all_jobs[name], folders[all_jobs[name].case], options))
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.3g} s")
    cores = len(os.sched_getaffinity(0))
    report(f"an update over processes of one thread, {cores} cores", rows_of(seconds, all_jobs, cores), options.json)


if __name__ == "__main__":
    main()
