"""The options of `perl-megatron sweep`. Optuna is imported only when the command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_sweep(commands: argparse._SubParsersAction, positive: Callable[[str], int]) -> None:
    """Add the command; ``positive`` reads a whole number from 1."""
    description = "many runs over any settings: grid, random or TPE, pruned by ASHA, by any number of workers"
    sweep = commands.add_parser("sweep", help=description, description=description)
    sweep.set_defaults(handler=run_sweep, preset=[])
    sweep.add_argument("config", type=Path, metavar="SWEEP.yaml", help="sweep file (docs/sweep.md)")
    sweep.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    how = sweep.add_mutually_exclusive_group()
    text = "workers on this machine, each with its share of the cores and GPUs (default: 1)"
    how.add_argument("--workers", type=positive, default=1, metavar="N", help=text)
    how.add_argument("--worker", action="store_true", help="be one worker, beside others on any machine")
    how.add_argument("--slurm", type=positive, metavar="N", help="submit a Slurm job array of N workers")
    how.add_argument("--results", action="store_true", help="print and write the table of what is finished")
    sweep.add_argument("--dry-run", action="store_true", help="check everything, and say what would run")
    sweep.add_argument("--retry-failed", action="store_true", help="begin points that have failed for good again")


def run_sweep(options: argparse.Namespace, argv: list[str]) -> int:
    """Start workers, be one, or show what they found; returns the exit status."""
    from perl_megatron.sweep.command import SweepOptions, run

    asked = SweepOptions(
        path=options.config,
        overrides=tuple(options.overrides),
        workers=options.workers,
        worker=options.worker,
        results=options.results,
        slurm=options.slurm,
        dry_run=options.dry_run,
        retry_failed=options.retry_failed,
    )
    return run(asked)
