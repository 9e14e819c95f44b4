"""The study: opened or made, compared with the sweep file, and filled with as many trials as the sweep has points.

All trials are enqueued before any is begun, and workers only take what is in the queue: so no number of workers can run
a point twice or one too many, and the sampler chooses a point's values when a worker takes it, knowing all that is
finished by then.
"""

from __future__ import annotations

import json
import uuid
from typing import Any, cast

import optuna
from optuna.trial import FrozenTrial, TrialState

from perl_megatron.config.load import config_fields, load_config
from perl_megatron.config.sweep_domain import Choice, Domain
from perl_megatron.config.sweep_file import Sweep
from perl_megatron.errors import UserError
from perl_megatron.sweep.file_lock import FileLock
from perl_megatron.sweep.storage import open_storage

SETTINGS = "settings"
"""User attribute of the study: what all workers of a sweep have to agree on."""
FOLDER, FOLDER_FILE = "folder", "study.id"
"""User attribute of the study, and file in the sweep's folder: the same word in both, made up when the study began."""
QUEUE_LOCK = "queue.lock"
SEED_STRIDE = 1_000_003
"""A prime between the sampler's seeds of two points, so that no two sweeps with near seeds share points."""


class Asha(optuna.pruners.SuccessiveHalvingPruner):
    """Optuna's, which does not count a point again for each time that it was interrupted.

    An interrupted trial keeps its rungs, and the one that repeats it has them too.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is to end now."""
        return super().prune(cast("optuna.Study", _WithoutFailed(study)), trial)


class _WithoutFailed:
    """A study as a pruner sees it: all of it but the trials that failed."""

    def __init__(self, study: optuna.Study):
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *, deepcopy: bool) -> list[FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy=deepcopy) if trial.state != TrialState.FAIL]


def open_study(sweep: Sweep, queue: FileLock) -> optuna.Study:
    """The sweep's study, with all its trials enqueued. The caller does not hold ``queue``, the lock of the sweep.

    Raises UserError where the study was begun with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # workers tell a person in their own words
    queue.acquire(lambda: None)
    try:
        study = optuna.create_study(
            study_name=sweep.sweep.name,
            storage=open_storage(sweep),
            sampler=make_sampler(sweep, 0),
            pruner=make_pruner(sweep),
            direction=sweep.sweep.direction,
            load_if_exists=True,
        )
        settings = shared_settings(sweep)
        if SETTINGS in study.user_attrs:
            _check_folder(study, sweep)
            _check_same(study.user_attrs[SETTINGS], settings, sweep)
        else:
            _check_new(sweep)
            study.set_user_attr(FOLDER, _folder_name(sweep, study.user_attrs.get(FOLDER)))
            study.set_user_attr(SETTINGS, settings)
        _enqueue_missing(study, sweep)
    finally:
        queue.release()
    return study


def read_study(sweep: Sweep) -> optuna.Study:
    """The study as it is. UserError where there is none."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not sweep.folder.is_dir():
        raise UserError("the sweep has not begun", where=str(sweep.folder), fix=sweep.command())
    try:
        return optuna.load_study(study_name=sweep.sweep.name, storage=open_storage(sweep))
    except KeyError as error:
        what = f"there is no study '{sweep.sweep.name}'"
        raise UserError(what, where=str(sweep.folder), fix=sweep.command()) from error


def suggest(trial: optuna.Trial, domain: Domain) -> Choice:
    """The trial's value: the sampler chooses it, unless the trial repeats another one."""
    if domain.kind == "choice":
        return trial.suggest_categorical(domain.name, list(domain.choices))
    if domain.kind == "int":
        bounds = round(domain.low), round(domain.high)
        return trial.suggest_int(domain.name, *bounds, log=domain.log, step=round(domain.step or 1))
    return trial.suggest_float(domain.name, domain.low, domain.high, log=domain.log, step=domain.step)


def make_sampler(sweep: Sweep, point: int) -> optuna.samplers.BaseSampler:
    """The sampler for one point: its seed is the point's own, so that two workers do not draw the same."""
    seed = (sweep.sweep.sampler_seed * SEED_STRIDE + point) % 2**32
    if sweep.sweep.sampler == "grid":
        grids = {domain.name: domain.grid() or [] for domain in sweep.space}
        return optuna.samplers.GridSampler(grids, seed=sweep.sweep.sampler_seed)
    if sweep.sweep.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # Workers run at the same time: a point that is being tried counts as a bad one, so that others look elsewhere.
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def make_pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    """The pruner of the sweep."""
    pruner = sweep.pruner
    if pruner.kind == "none":
        return optuna.pruners.NopPruner()
    return Asha(
        min_resource=pruner.min_steps, reduction_factor=pruner.reduction_factor, bootstrap_count=pruner.min_trials
    )


def shared_settings(sweep: Sweep) -> dict[str, Any]:
    """What may not change once a sweep has begun: the points, and the runs at each of them. JSON."""
    section = sweep.sweep
    runs = load_config(section.config, section.overrides).config
    values = {}
    for key in config_fields():
        part, name = key.split(".")
        if part != "run" or name == "steps":
            values[key] = repr(getattr(getattr(runs, part), name))
    agreed = {
        "sampler": section.sampler,
        "sampler_seed": section.sampler_seed,
        "seeds": list(section.seeds),
        "seed_overrides": list(section.seed_overrides),
        "metric": section.metric,
        "direction": section.direction,
        "pruner": sweep.pruner.model_dump(mode="json"),
        **{f"space: {domain.name}": domain.describe() for domain in sweep.space},
        **{f"config: {key}": value for key, value in values.items()},
    }
    return json.loads(json.dumps(agreed))


def _folder_name(sweep: Sweep, began: str | None) -> str:
    """The word in the folder; a new one where there is none."""
    file = sweep.folder / FOLDER_FILE
    if not file.is_file() or not file.read_text(encoding="ascii"):
        file.write_text(began or uuid.uuid4().hex, encoding="ascii")
    return file.read_text(encoding="ascii")


def _check_folder(study: optuna.Study, sweep: Sweep) -> None:
    """Workers of two folders would not see each other's locks, and each would have only some of the runs."""
    began, file = study.user_attrs.get(FOLDER), sweep.folder / FOLDER_FILE
    if began is not None and (not file.is_file() or file.read_text(encoding="ascii") != began):
        raise UserError(
            f"the study '{sweep.sweep.name}' of this storage belongs to a sweep in another folder",
            where=f"{sweep.places['sweep.storage']}: sweep.storage, {sweep.folder}",
            fix="give this sweep another sweep.name, or set sweep.directory to the one that the study began with",
        )


def _check_new(sweep: Sweep) -> None:
    if any(sweep.folder.glob("point-*")):
        raise UserError(
            "the sweep's study is new, but its folder holds the runs of another one",
            where=str(sweep.folder),
            fix="go on with that study (sweep.storage), give this sweep another sweep.name, or remove point-*",
        )


def _check_same(began: dict[str, Any], now: dict[str, Any], sweep: Sweep) -> None:
    changed = [
        f"{key}: {began.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(began.keys() | now.keys())
        if began.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"the sweep '{sweep.sweep.name}' began with other settings:\n  " + "\n  ".join(changed),
            where=f"{sweep.folder} and {sweep.path}",
            fix="go on with the same settings, or give this sweep another sweep.name",
        )


def _enqueue_missing(study: optuna.Study, sweep: Sweep) -> None:
    """As many trials without values as are missing; also after a worker that died while it did this."""
    known = [trial for trial in study.get_trials(deepcopy=False) if "failed_trial" not in trial.system_attrs]
    for _ in range(sweep.num_trials - len(known)):
        study.add_trial(optuna.create_trial(state=TrialState.WAITING))
