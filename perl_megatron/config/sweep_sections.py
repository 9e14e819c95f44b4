"""The sections of a sweep file: what is varied, how often, by whom, and where the outcome is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from perl_megatron.config.section import Section, as_texts


def as_list(value: object) -> object:
    """A list of texts that may hold commas: YAML's own form, or one text alone."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def as_whole_numbers(value: object) -> object:
    """A list of whole numbers; one may stand alone, and several in one text, with commas."""
    if isinstance(value, str):
        parts = as_texts(value)
        assert isinstance(parts, tuple)
        return tuple(int(part) if part.isdecimal() else part for part in parts)
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else value


class SweepSection(Section):
    """The points of a sweep and what is measured at them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep: of its folder and of Optuna's study."""
    config: Path
    """Config file of the runs; the sweep sets what it varies, run.name, run.directory and run.seed."""
    overrides: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Settings of all runs (`section.key=value`, `preset=NAME`), above the config file's own."""
    seed_overrides: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """More of them, with `{seed}` for the run's seed: data or a first policy that each seed has of its own."""
    directory: Path = Path("runs/sweeps")
    """Folder that holds all sweeps; all workers have to see it."""
    storage: str | None = None
    """Where Optuna keeps the study: a database URL (`postgresql://…`, `sqlite:///FILE`) or the path of a journal file;
    None: `study.journal` in the sweep's folder, which several machines may write to if they share the folder."""
    sampler: Literal["grid", "random", "tpe"] = "tpe"
    """Who chooses the points: all combinations, chance, or Optuna's tree-structured Parzen estimator."""
    sampler_seed: int = Field(default=0, ge=0)
    """Seed of random and tpe; the random points are the same with any number of workers."""
    trials: int | None = Field(default=None, ge=1)
    """Number of points; None: all of a grid. More than before add points to a sweep that is there."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_whole_numbers)] = Field(
        default=(0,), min_length=1
    )
    """run.seed of each run of a point; all points get the same ones, so that they are compared in pairs."""
    metric: str = "evaluation/accuracy"
    """What counts: a metric of metrics.jsonl, its last value in a run (`NAME:max`: the greatest; also first, min, mean,
    sum), and the mean of that over the seeds."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Which values of the metric are better."""
    measures: Annotated[tuple[str, ...], BeforeValidator(as_texts)] = ()
    """Further columns of the table, in the same form, such as evaluation/flip_rate, groups/kept:sum."""
    reference: str | None = None
    """Name of the arm that others are compared with; None: the best point."""


class WorkerSection(Section):
    """How workers carry trials out, and what happens to those that were interrupted."""

    heartbeat: int = Field(default=60, ge=1)
    """Seconds between a worker's signs of life."""
    grace: int = Field(default=180, ge=2)
    """After so many seconds without one, a worker's trial is given to another, which resumes its run."""
    retries: int = Field(default=3, ge=0)
    """How often a point is begun again after its run crashed or its worker died (preemptions are not counted)."""
    max_failures: int = Field(default=5, ge=1)
    """Workers end when so many points have failed for good: the mistake is then likely one of all points."""
    stop_seconds: float = Field(default=600.0, gt=0)
    """How long a run that is pruned or interrupted may take to end its step and write a checkpoint."""
    keep_weights: bool = True
    """Whether the runs of finished trials keep their checkpoints and exported policies; metrics and reports stay."""


class PrunerSection(Section):
    """Which trials end early. A trial's progress counts in steps: of its first seed at every value of sweep.metric,
    afterwards whole runs (s steps each): the mean over n finished seeds counts as n · s steps."""

    kind: Literal["none", "asha"] = "none"
    """'asha': asynchronous successive halving (Li et al. 2020), Optuna's SuccessiveHalvingPruner."""
    min_steps: int = Field(default=1, ge=1)
    """No trial ends before so many steps; the later decisions come after reduction_factor times as many, each."""
    reduction_factor: int = Field(default=3, ge=2)
    """One in so many trials goes on at each decision."""
    min_trials: int = Field(default=0, ge=0)
    """So many trials have to reach a decision before any passes it: Optuna ends these, so leave it at 0 for few."""


class ArraySection(Section):
    """The Slurm job array of `perl-megatron sweep --slurm N`: N workers, a trial at a time each, on as many nodes
    a worker as `launch.nodes` of its runs says."""

    options: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Options of sbatch, such as `--partition=gpu`, `--gpus-per-node=8`, `--time=08:00:00`."""
    setup: Path | None = None
    """Shell script that is sourced first: modules, an environment."""


class Interval(Section):
    """The values of a number between two bounds."""

    low: float
    """Least value."""
    high: float
    """Greatest value."""
    step: float | None = Field(default=None, gt=0)
    """Only every so much from `low` on; None: any value (whole numbers: every one)."""
    log: bool = False
    """Even in the logarithm; `low` is then above 0."""
    points: int | None = Field(default=None, ge=2)
    """Grid: so many values from `low` to `high`, evenly spaced."""


class SweepSettings(Section):
    """A sweep file, but for `space` and `arms`."""

    sweep: SweepSection
    workers: WorkerSection = WorkerSection()
    pruner: PrunerSection = PrunerSection()
    slurm: ArraySection = ArraySection()
