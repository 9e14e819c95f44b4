"""Whether the runs of a sweep could start: every value of every domain against the config's schema and layout."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from perl_megatron.config.architecture import ArchitectureNumbers, read_architecture_numbers
from perl_megatron.config.derive import derive, require_training_data
from perl_megatron.config.derive_launch import check_array, processes_per_node
from perl_megatron.config.layout import launched_processes
from perl_megatron.config.load import ConfigFile
from perl_megatron.config.schema import Config
from perl_megatron.config.sweep_domain import ARM, Choice, Domain, grid_points
from perl_megatron.config.sweep_file import Sweep
from perl_megatron.errors import UserError
from perl_megatron.sweep.measure import Measure

MAX_CHECKED_POINTS = 5000
"""All points of a grid are checked up to here; each takes one or two milliseconds, and every worker does it."""
PLACING = ("parallel.", "launch.")
"""Sections whose fields say how many processes and machines a run has."""

Point = Mapping[str, Choice]


def check_sweep(sweep: Sweep) -> str:
    """UserError, with the key and its place, for the first thing that no run could start with. Nothing is created.

    Returns, in words, how many points of the grid were not checked; '' where that is none.
    """
    measures(sweep)
    runs = _Runs(sweep, ConfigFile.read(sweep.sweep.config), {})
    for point, where, at in _values(sweep):
        runs.check(point, sweep.sweep.seeds[0], where, at)
    points = _grid(sweep)
    for point in points:
        runs.check(point, sweep.sweep.seeds[0], str(sweep.path), str(dict(point)))
    point, _, at = next(_values(sweep))
    for seed in sweep.sweep.seeds[1:]:
        runs.check(point, seed, f"{sweep.places['sweep.seeds']}, seed {seed}", at)
    if len(points) == len(sweep.points or ()):
        return ""
    return f"{len(points)} of {sweep.num_trials} points were checked"


def check_slurm_array(sweep: Sweep) -> int:
    """The machines that each task of a job array needs: the most that a run has, by the points that are checked.

    UserError for a run that cannot be one step of such a job, and for a section `slurm` that makes none.
    """
    check_array(sweep.slurm, sweep.folder, sweep.places)
    most = 1
    for config in _placings(sweep):
        processes_per_node(config)
        if config.launch.rollout_nodes:
            raise UserError(
                "a trial has no machines for rollout servers",
                where=f"launch.rollout_nodes = {config.launch.rollout_nodes}, --slurm",
                fix="set launch.rollout_nodes=0 in sweep.overrides: the engine then samples in the trainer's processes",
            )
        most = max(most, config.launch.nodes)
    return most


def num_processes(sweep: Sweep) -> int:
    """The most processes that one of its runs starts, by the points that are checked."""
    return max(launched_processes(config) for config in _placings(sweep))


def has_multi_node_runs(sweep: Sweep) -> bool:
    """Whether one of its runs has several machines in a Slurm job, by the points that are checked."""
    return any(config.launch.nodes > 1 for config in _placings(sweep))


def measures(sweep: Sweep) -> tuple[Measure, ...]:
    """`sweep.metric`, then `sweep.measures`. UserError for one that there is not."""
    section = sweep.sweep
    written = (("sweep.metric", section.metric), *(("sweep.measures", text) for text in section.measures))
    return tuple(Measure.read(text, f"{sweep.places[key]}: {key}") for key, text in written)


@dataclass(frozen=True)
class _Runs:
    """The runs of a sweep, of whose files each is read once."""

    sweep: Sweep
    file: ConfigFile
    architectures: dict[str, ArchitectureNumbers]

    def check(self, point: Point, seed: int, where: str, at: str) -> None:
        """``where`` is the place in the sweep file; the error names that of the config too."""
        sweep = self.sweep
        try:
            config = self.file.load(sweep.overrides(point, seed)).config
            path = str(config.model.path)
            if path not in self.architectures:
                self.architectures[path] = read_architecture_numbers(path)
            world_size = launched_processes(config)
            derive(config, world_size=world_size, architecture=self.architectures[path], command="train")
            require_training_data(config)
            if sweep.sweep.metric.startswith("evaluation/") and config.data.evaluation is None:
                fix = "set data.evaluation, or another sweep.metric"
                raise UserError(f"{sweep.sweep.metric} is not measured", where="data.evaluation", fix=fix)
        except UserError as error:
            what = f"no run can start at {at}: {error.what}"
            raise UserError(what, where=f"{where} ({error.where})", fix=error.fix) from error


def _values(sweep: Sweep) -> Iterator[tuple[Point, str, str]]:
    """(point, the place that set it, in words) for every value of every domain, beside the first of the others."""
    first = {domain.name: domain.samples()[0] for domain in sweep.space}
    for domain in sweep.space:
        for value in domain.samples():
            yield first | {domain.name: value}, sweep.places[domain.name], f"{domain.name} = {value!r}"


def _grid(sweep: Sweep) -> list[Point]:
    """The points of a grid that are checked.

    Of more than MAX_CHECKED_POINTS those in which every interval of fractions has its bounds or a value between them:
    they are compared with other numbers, but divide nothing. If that is still too many, so many of them by chance, the
    same for every worker.
    """
    points: list[Point] = [*(sweep.points or ())]
    if len(points) > MAX_CHECKED_POINTS:
        points = [*(grid_points([_thinned(domain) for domain in sweep.space]) or ())]
    if len(points) > MAX_CHECKED_POINTS:
        points = random.Random(0).sample(points, MAX_CHECKED_POINTS)
    return points


def _thinned(domain: Domain) -> Domain:
    values = domain.grid() or []
    if domain.kind != "float" or len(values) <= 3:
        return domain
    kept = (values[0], values[len(values) // 2], values[-1])
    return Domain(domain.name, "choice", choices={value: domain.overrides(value) for value in kept})


def _placings(sweep: Sweep) -> Iterator[Config]:
    """A config for all combinations, among the points that are checked, of what says where a run is."""
    file, seed = ConfigFile.read(sweep.sweep.config), sweep.sweep.seeds[0]
    first = next(_values(sweep))[0]
    names = [domain.name for domain in sweep.space if domain.name == ARM or domain.name.startswith(PLACING)]
    checked: Iterable[Point] = (*(point for point, _, _ in _values(sweep)), *_grid(sweep))
    for values in dict.fromkeys(tuple(point[name] for name in names) for point in checked):
        yield file.load(sweep.overrides({**first, **dict(zip(names, values, strict=True))}, seed)).config
