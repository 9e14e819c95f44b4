"""`perl-megatron sweep`: workers on this machine, one worker, a Slurm array of them, or the results so far."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import TrialState

from perl_megatron.config.storage_url import without_password
from perl_megatron.config.sweep_file import Sweep, read_sweep
from perl_megatron.errors import UserError
from perl_megatron.launch.failures import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from perl_megatron.launch.job_step import SlurmJob
from perl_megatron.launch.sweep_array import render_array, submit
from perl_megatron.launch.sweep_workers import run_workers
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.sweep import results
from perl_megatron.sweep.check import check_slurm_array, check_sweep, has_multi_node_runs, num_processes
from perl_megatron.sweep.file_lock import FileLock
from perl_megatron.sweep.plots import write_plots
from perl_megatron.sweep.storage import (
    JOURNAL_NAME,
    PREEMPTED,
    REFUSED,
    may_go_on,
    put_back,
    storage_failures,
    unfinished_points,
)
from perl_megatron.sweep.study import QUEUE_LOCK, open_study, read_study
from perl_megatron.sweep.trial_run import TrialRun
from perl_megatron.sweep.worker import Worker, failed_points


@dataclass(frozen=True)
class SweepOptions:
    """What the command line asks for."""

    path: Path
    overrides: tuple[str, ...]
    workers: int = 1
    worker: bool = False
    results: bool = False
    slurm: int | None = None
    dry_run: bool = False
    retry_failed: bool = False


def run(options: SweepOptions) -> int:
    """Do it; returns the exit status: 0, 1 where points have failed, 75 where the sweep was interrupted."""
    if options.retry_failed and (options.worker or options.results):
        fix = "leave out --worker and --results: --retry-failed puts the points into the queue, for all workers"
        raise UserError("nothing would be begun again", where="--retry-failed", fix=fix)
    sweep = read_sweep(options.path, options.overrides)
    with storage_failures(sweep):
        return _run(sweep, options)


def _run(sweep: Sweep, options: SweepOptions) -> int:
    if options.results:
        write_results(sweep, read_study(sweep))
        return 0
    unchecked = check_sweep(sweep)
    if unchecked:
        print(unchecked)
    command = [sys.executable, "-m", "perl_megatron", "sweep", str(options.path), "--worker", *options.overrides]
    if options.slurm is not None:
        return _submit(sweep, command, options)
    if options.workers > 1 and SlurmJob.is_here() and has_multi_node_runs(sweep):
        raise UserError(
            "the runs of all workers would be on the same machines of this Slurm job, and meet at one port",
            where=f"--workers {options.workers}, launch.nodes",
            fix=f"use --slurm {options.workers}, where each worker has machines of its own, or --workers 1",
        )
    if options.dry_run:
        _describe(sweep)
        return 0
    if options.worker:
        with StopRequest() as stop:
            return Worker(sweep, stop).work()
    study = _prepare(sweep, retry_failed=options.retry_failed)
    statuses = [0]
    if _is_open(sweep, study):  # if not, only the table is made again
        statuses = run_workers(command, workers=options.workers, processes=num_processes(sweep))
    study = read_study(sweep)
    write_results(sweep, study)
    return _conclude(sweep, study, statuses)


def write_results(sweep: Sweep, study: optuna.Study) -> None:
    """Print the table; write it as Markdown, CSV and JSON, and the plots, into the sweep's folder."""
    found = results.read_results(sweep, study)
    table = results.to_markdown(sweep, found)
    reference = results.reference_of(sweep, found)
    print(table)
    if reference is not None:
        print(f"mean over seeds ± 95 % interval; differences from point {reference.point}, seed by seed")
    folder = sweep.folder
    for name, text in (
        ("results.md", table),
        ("results.csv", results.to_csv(results.table_rows(sweep, found))),
        ("results.json", results.to_json(sweep, found)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    plots = write_plots(sweep, study, found, folder)
    print(
        f"{folder}: results.md, results.csv, results.json, {', '.join(path.name for path in plots) or 'no plots yet'}"
    )
    storage = without_password(sweep.sweep.storage or str(folder / JOURNAL_NAME))
    print(f"to look closer: optuna-dashboard {shlex.quote(storage)}")


def _prepare(sweep: Sweep, *, retry_failed: bool) -> optuna.Study:
    """The study with its queue, before any worker asks for it."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    queue = FileLock(sweep.folder / QUEUE_LOCK)
    study = open_study(sweep, queue)
    if retry_failed:
        queue.acquire(lambda: None)
        for point in failed_points(study, sweep.workers.retries):
            trial = copy.deepcopy(unfinished_points(study)[point])
            trial.system_attrs["retry_history"] = []  # counted anew
            trial.user_attrs.update({REFUSED: False, PREEMPTED: 0})
            put_back(study, trial)
    queue.close()
    return study


def _is_open(sweep: Sweep, study: optuna.Study) -> bool:
    """Whether there is anything left to do."""
    states = (TrialState.WAITING, TrialState.RUNNING)
    interrupted = unfinished_points(study).values()
    return bool(study.get_trials(deepcopy=False, states=states)) or any(
        may_go_on(trial, sweep.workers.retries) for trial in interrupted
    )


def _submit(sweep: Sweep, command: Sequence[str], options: SweepOptions) -> int:
    if any(without_password(word) != word for word in command):
        raise UserError(
            "the password would be written into the job's script",
            where="--slurm, sweep.storage on the command line",
            fix="set sweep.storage in the sweep file, or leave the password to the driver (PostgreSQL: ~/.pgpass)",
        )
    script = render_array(
        command,
        workers=options.slurm or 1,
        nodes=check_slurm_array(sweep),
        name=sweep.sweep.name,
        folder=sweep.folder,
        options=sweep.slurm.options,
        setup=sweep.slurm.setup,
    )
    if options.dry_run:
        print(script, end="")
        return 0
    _prepare(sweep, retry_failed=options.retry_failed)
    path = sweep.folder / "workers.sbatch"
    path.write_text(script, encoding="utf-8")
    print(f"job array {submit(path)}: {sweep.folder}/worker-N.log")
    print(f"the results so far: {sweep.command('--results')}")
    return 0


def _describe(sweep: Sweep) -> None:
    """What would run."""
    section = sweep.sweep
    print(f"{sweep.num_trials} points with seeds {', '.join(map(str, section.seeds))}: {section.sampler}")
    for domain in sweep.space:
        values = list(domain.choices) or f"{domain.low:g} … {domain.high:g}{' (log)' if domain.log else ''}"
        print(f"  {domain.name}: {values}")
    first = sweep.points[0] if sweep.points else {domain.name: domain.samples()[0] for domain in sweep.space}
    overrides = sweep.overrides(first, section.seeds[0])
    run = TrialRun(section.config, overrides, sweep.folder / "point-0000" / f"seed-{section.seeds[0]}", lock=-1)
    print(f"such as: {shlex.join(run.command())}")


def _conclude(sweep: Sweep, study: optuna.Study, statuses: Sequence[int]) -> int:
    failed = failed_points(study, sweep.workers.retries)
    if EXIT_USER_ERROR in statuses:
        return EXIT_USER_ERROR  # the worker has said why
    if _is_open(sweep, study):
        print(f"the sweep is not finished; go on with: {sweep.command()}")
        return EXIT_STOPPED if EXIT_STOPPED in statuses else EXIT_FAILURE
    if failed:
        numbers = ", ".join(map(str, sorted(failed)))
        print(f"points that failed: {numbers} (begin them again: {sweep.command('--retry-failed')})", file=sys.stderr)
        return EXIT_FAILURE
    return 0
