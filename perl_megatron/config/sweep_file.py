"""Read a sweep file: the sections of `sweep_sections.py`, `space` (config field → its values) and `arms`.

    space:
      optimizer.learning_rate: {low: 1.0e-6, high: 1.0e-3, log: true}
      algorithm.ratio: [token, sequence]
    arms:                       # named sets of settings that are varied together
      plain GRPO: [permutation.num_permuted=0, rollout.num_rollouts=12]

A file may start from another one (`base: other.yaml`), as a config. Every error names the key and the line.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError

from perl_megatron.config import yaml_source
from perl_megatron.config.load import BASE_KEY, config_fields, load_sections, nearest_key
from perl_megatron.config.storage_url import without_password
from perl_megatron.config.sweep_domain import ARM, Choice, Domain, grid_points
from perl_megatron.config.sweep_sections import (
    ArraySection,
    Interval,
    PrunerSection,
    SweepSection,
    SweepSettings,
    WorkerSection,
)
from perl_megatron.errors import UserError

SPACE_KEY, ARMS_KEY = "space", "arms"
SET_BY_THE_SWEEP = ("run.name", "run.directory", "run.seed")


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was read and checked by itself (not yet against the config of its runs)."""

    path: Path
    settings: SweepSettings
    space: tuple[Domain, ...]
    places: Mapping[str, str]
    """Where each domain and each setting comes from."""
    points: tuple[dict[str, Choice], ...] | None
    """Of a grid: all of them."""
    given: tuple[str, ...] = ()
    """What the command line set."""

    def command(self, *flags: str) -> str:
        """The command line that has to do with this sweep, with what was set on this one; passwords are not shown."""
        words = ("perl-megatron", "sweep", str(self.path), *flags, *self.given)
        return shlex.join(map(without_password, words))

    @property
    def sweep(self) -> SweepSection:
        """The section of that name."""
        return self.settings.sweep

    @property
    def workers(self) -> WorkerSection:
        """The section of that name."""
        return self.settings.workers

    @property
    def pruner(self) -> PrunerSection:
        """The section of that name."""
        return self.settings.pruner

    @property
    def slurm(self) -> ArraySection:
        """The section of that name."""
        return self.settings.slurm

    @property
    def num_trials(self) -> int:
        """How many points the sweep has."""
        number = self.sweep.trials if self.points is None else len(self.points)
        assert number is not None, "`read_sweep` asks for it"
        return number

    @property
    def folder(self) -> Path:
        """The sweep's own."""
        return self.sweep.directory / self.sweep.name

    def overrides(self, values: Mapping[str, Choice], seed: int) -> list[str]:
        """The settings of the run at one point with one seed, but for its name and directory."""
        own = [override for domain in self.space for override in domain.overrides(values[domain.name])]
        by_seed = [override.replace("{seed}", str(seed)) for override in self.sweep.seed_overrides]
        return [*self.sweep.overrides, *by_seed, *own, f"run.seed={seed}"]


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and what the command line sets otherwise. UserError names key, place and fix."""
    settings, places = load_sections(SweepSettings, path, overrides, beside=(SPACE_KEY, ARMS_KEY))
    own = _read_domains(path)
    if not own:
        fix = "add `space:` with config fields and their values, or `arms:` with named sets of settings"
        raise UserError("the sweep varies nothing", where=str(path), fix=fix)
    space = tuple(domain for domain, _ in own.values())
    points = _points(settings.sweep, space, places)
    places = places | {name: place for name, (_, place) in own.items()}
    seeds = settings.sweep.seeds
    if len(set(seeds)) < len(seeds):
        raise UserError(f"a seed is there twice: {list(seeds)}", where=places["sweep.seeds"], fix="name each once")
    arms = [domain.choices for domain in space if domain.name == ARM]
    if settings.sweep.reference is not None and settings.sweep.reference not in (arms[0] if arms else ()):
        fix = f"one of {', '.join(map(str, arms[0]))}" if arms else "leave it out: there are no `arms`"
        what = f"there is no arm '{settings.sweep.reference}'"
        raise UserError(what, where=f"{places['sweep.reference']}: sweep.reference", fix=fix)
    if settings.workers.grace < 2 * settings.workers.heartbeat:
        raise UserError(
            f"workers.grace = {settings.workers.grace} s is less than two heartbeats of {settings.workers.heartbeat} s",
            where=", ".join(dict.fromkeys((places["workers.grace"], places["workers.heartbeat"]))),
            fix="a worker that is alive would be taken for dead: raise workers.grace or lower workers.heartbeat",
        )
    return Sweep(path, settings, space, places, points, tuple(overrides))


def _points(
    sweep: SweepSection, space: Sequence[Domain], places: Mapping[str, str]
) -> tuple[dict[str, Choice], ...] | None:
    if sweep.sampler != "grid":
        if sweep.trials is None:
            where = f"sweep.sampler = {sweep.sampler}"
            raise UserError("'sweep.trials' has to be set", where=where, fix="say how many points to try")
        return None
    for domain in space:
        if domain.grid() is None:
            fix = f"give a list of values, or say how many, as `{domain.name}: {{low: …, high: …, points: 5}}`"
            raise UserError(f"a grid needs the values of {domain.name}", where=f"{SPACE_KEY}: {domain.name}", fix=fix)
    points = grid_points(space)
    assert points is not None
    if sweep.trials not in (None, len(points)):
        raise UserError(
            f"the grid has {len(points)} points, not {sweep.trials}",
            where=f"{places['sweep.trials']}: sweep.trials",
            fix="leave it out, or set sweep.sampler=random for some of them",
        )
    return tuple(points)


def _read_domains(path: Path) -> dict[str, tuple[Domain, str]]:
    """Every domain by its name, with its place; a file's own win over those of its base."""
    root = yaml_source.read(path)
    if not isinstance(root, yaml.MappingNode):
        return {}
    found: dict[str, tuple[Domain, str]] = {}
    base: dict[str, tuple[Domain, str]] = {}
    for key, key_node, node in yaml_source.items(root, str(path)):
        where = f"{path}:{yaml_source.line(key_node)}"
        if key == BASE_KEY:
            base = _read_domains(path.parent / str(yaml_source.plain(node, str(path))))
        elif key in (SPACE_KEY, ARMS_KEY):
            if not isinstance(node, yaml.MappingNode):
                what = "config fields and their values" if key == SPACE_KEY else "names and settings"
                raise UserError(f"`{key}` holds {what}", where=where, fix="see docs/sweep.md")
            entries = yaml_source.items(node, str(path))
            if key == ARMS_KEY:
                arms: dict[Choice, tuple[str, ...]] = {
                    name: _arm(name, value, f"{path}:{yaml_source.line(at)}") for name, at, value in entries
                }
                found[ARM] = Domain(ARM, "choice", choices=arms), where
            else:
                for name, at, value in entries:
                    place = f"{path}:{yaml_source.line(at)}"
                    found[name] = _domain(name, yaml_source.plain(value, str(path)), place), place
    return base | found


def _arm(name: str, node: yaml.Node, where: str) -> tuple[str, ...]:
    settings = yaml_source.plain(node, where)
    if not isinstance(settings, list) or not all(isinstance(setting, str) for setting in settings):
        raise UserError(f"the arm '{name}' is no list of settings", where=where, fix="write [section.key=value, …]")
    for setting in settings:
        _refuse_own(setting.partition("=")[0].strip(), where)
    return tuple(settings)


def _domain(name: str, value: Any, where: str) -> Domain:
    if name not in config_fields():
        raise UserError(f"{SPACE_KEY}: unknown key '{name}'", where=where, fix=f"did you mean '{nearest_key(name)}'?")
    _refuse_own(name, where)
    return _choices(name, value, where) if isinstance(value, list) else _interval(name, value, where)


def _refuse_own(key: str, where: str) -> None:
    if key in SET_BY_THE_SWEEP:
        raise UserError(f"{key} is set by the sweep itself", where=where, fix="remove it; seeds are `sweep.seeds`")


def _choices(name: str, values: list[Any], where: str) -> Domain:
    choices: dict[Choice, tuple[str, ...]] = {}
    for value in values:
        if isinstance(value, dict):
            raise UserError(
                f"{SPACE_KEY}: {name} has a choice that is no value: {value}",
                where=where,
                fix=f"write values alone, {name}: [first, second]; settings that belong together go into `{ARMS_KEY}`",
            )
        stored = yaml_source.dump_scalar(value) if isinstance(value, list) else value
        if stored in choices:
            raise UserError(f"{SPACE_KEY}: {name} has the choice {value!r} twice", where=where, fix="keep one")
        choices[stored] = (f"{name}={yaml_source.dump_scalar(value)}",)
    if not choices:
        raise UserError(f"{SPACE_KEY}: {name} has no choices", where=where, fix="name at least one, or remove the key")
    return Domain(name, "choice", choices=choices)


def _interval(name: str, value: Any, where: str) -> Domain:
    example = f"{name}: [first, second], or {name}: {{low: 1, high: 10}}"
    if not isinstance(value, dict):
        raise UserError(f"{SPACE_KEY}: {name} = {value!r} is no set of values", where=where, fix=example)
    numbers = {key: float(part) if type(part) is int and key != "points" else part for key, part in value.items()}
    try:
        interval = Interval.model_validate(numbers, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = str(problem["loc"][0])
        info = Interval.model_fields.get(key)
        fix = f"{key}: {info.description}" if info is not None else f"the keys are {', '.join(Interval.model_fields)}"
        raise UserError(f"{SPACE_KEY}: {name}: {key}: {problem['msg']}", where=where, fix=fix) from error
    return _checked(name, interval, value, where)


def _checked(name: str, interval: Interval, given: Mapping[str, Any], where: str) -> Domain:
    """Refuse an interval that has no values, or that is not one of the field's type."""

    def refuse(what: str, fix: str) -> UserError:
        return UserError(f"{SPACE_KEY}: {name}: {what}", where=where, fix=fix)

    annotation = config_fields()[name].annotation
    types = {annotation, *get_args(annotation)}
    if not types & {int, float} or bool in types:
        raise refuse("is no number, so it has no interval", f"give a list of values: {name}: [first, second]")
    kind: Literal["int", "float"] = "float" if float in types else "int"
    bounds = [given[key] for key in ("low", "high", "step") if given.get(key) is not None]
    if kind == "int" and not all(type(bound) is int for bound in bounds):
        raise refuse(f"takes whole numbers, not {bounds}", "write whole numbers")
    if not all(math.isfinite(bound) for bound in bounds) or interval.low >= interval.high:
        raise refuse(f"low = {interval.low:g} is not below high = {interval.high:g}", "exchange them, or set one value")
    if interval.log and interval.low <= 0:
        raise refuse(f"low = {interval.low:g} has no logarithm", "raise it above 0, or leave `log` out")
    if interval.step is not None and (interval.log or interval.points is not None):
        raise refuse("`step` goes with neither `log` nor `points`", "leave one out")
    return Domain(
        name,
        kind,
        low=interval.low,
        high=interval.high,
        step=interval.step,
        log=interval.log,
        points=interval.points,
    )
