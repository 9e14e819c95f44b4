"""Whether the runs of a sweep could start: every value of every domain against the config's schema and layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import derive, require_training_data
from perl_megatron.config.derive_launch import processes_per_node
from perl_megatron.config.layout import launched_processes
from perl_megatron.config.load import load_config
from perl_megatron.config.schema import Config
from perl_megatron.config.sweep_domain import Choice
from perl_megatron.config.sweep_file import Sweep
from perl_megatron.errors import UserError
from perl_megatron.sweep.measure import Measure

MAX_CHECKED_POINTS = 200
"""Of a larger grid only so many points are checked whole; the others' values are checked one by one."""


def check_sweep(sweep: Sweep) -> None:
    """UserError, with the key and its place, for the first thing that no run could start with. Nothing is created."""
    measures(sweep)
    for point, where, at in _checked_points(sweep):
        _check_run(sweep, point, sweep.sweep.seeds[0], where, at)
    point, _, at = next(_checked_points(sweep))
    for seed in sweep.sweep.seeds[1:]:
        _check_run(sweep, point, seed, f"{sweep.places['sweep.seeds']}, seed {seed}", at)


def num_processes(sweep: Sweep) -> int:
    """The most processes that one of its runs starts, by the values that are checked."""
    return max(launched_processes(config) for config in _checked_configs(sweep))


def has_multi_node_runs(sweep: Sweep) -> bool:
    """Whether one of its runs has several machines in a Slurm job, by the values that are checked."""
    return any(config.launch.nodes > 1 for config in _checked_configs(sweep))


def num_nodes(sweep: Sweep) -> int:
    """The most machines that one of its runs has in a Slurm job, by the values that are checked.

    UserError for a run that cannot be one step of such a job.
    """
    most = 1
    for config in _checked_configs(sweep):
        processes_per_node(config)
        if config.launch.rollout_nodes:
            raise UserError(
                "a trial has no machines for rollout servers",
                where=f"launch.rollout_nodes = {config.launch.rollout_nodes}, --slurm",
                fix="set launch.rollout_nodes=0 in sweep.overrides: the engine then samples in the trainer's processes",
            )
        most = max(most, config.launch.nodes)
    return most


def _checked_configs(sweep: Sweep) -> Iterator[Config]:
    seed = sweep.sweep.seeds[0]
    for point, _, _ in _checked_points(sweep):
        yield load_config(sweep.sweep.config, sweep.overrides(point, seed)).config


def _checked_points(sweep: Sweep) -> Iterator[tuple[dict[str, Choice], str, str]]:
    """(point, the place that set it, in words) for every value of every domain, and for all points of a grid."""
    first = {domain.name: domain.samples()[0] for domain in sweep.space}
    for domain in sweep.space:
        for value in domain.samples():
            yield first | {domain.name: value}, sweep.places[domain.name], f"{domain.name} = {value!r}"
    for point in (sweep.points or ())[:MAX_CHECKED_POINTS]:
        yield point, str(sweep.path), str(point)


def measures(sweep: Sweep) -> tuple[Measure, ...]:
    """`sweep.metric`, then `sweep.measures`. UserError for one that there is not."""
    section = sweep.sweep
    written = (("sweep.metric", section.metric), *(("sweep.measures", text) for text in section.measures))
    return tuple(Measure.read(text, f"{sweep.places[key]}: {key}") for key, text in written)


def _check_run(sweep: Sweep, point: Mapping[str, Choice], seed: int, where: str, at: str) -> None:
    """``where`` is the place in the sweep file; the error names that of the config too."""
    try:
        config = load_config(sweep.sweep.config, sweep.overrides(point, seed)).config
        architecture = read_architecture_numbers(config.model.path)
        derive(config, world_size=launched_processes(config), architecture=architecture, command="train")
        require_training_data(config)
        if sweep.sweep.metric.startswith("evaluation/") and config.data.evaluation is None:
            fix = "set data.evaluation, or another sweep.metric"
            raise UserError(f"{sweep.sweep.metric} is not measured", where="data.evaluation", fix=fix)
    except UserError as error:
        what = f"no run can start at {at}: {error.what}"
        raise UserError(what, where=f"{where} ({error.where})", fix=error.fix) from error
