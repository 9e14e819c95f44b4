"""Pictures of a sweep: its points with intervals, and Optuna's own (history, curves, importances)."""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

from perl_megatron.config.sweep_file import Sweep
from perl_megatron.observability.sweep_plot import PlottedPoint, plot_points, save_axes
from perl_megatron.sweep.intervals import MeanInterval
from perl_megatron.sweep.results import PointResult, shown

MIN_TRIALS_FOR_IMPORTANCE = 4
"""PED-ANOVA compares the best trials with the others: fewer are no sample."""


def write_plots(sweep: Sweep, study: optuna.Study, results: list[PointResult], folder: Path) -> list[Path]:
    """Write what there are data for; returns the files."""
    written = []
    complete = [result for result in results if result.state == "complete"]
    if complete:
        metrics = (sweep.sweep.metric, *sweep.sweep.measures)
        panels = [(metric, [_plotted(result, metric) for result in complete]) for metric in metrics]
        measured = [(metric, points) for metric, points in panels if all(point.values for point in points)]
        plot_points(measured, folder / "points.png")
        written.append(folder / "points.png")
    return [*written, *_optuna_plots(study, folder)]


def _plotted(result: PointResult, metric: str) -> PlottedPoint:
    values = list(result.values.get(metric, {}).values())
    interval = MeanInterval.of(values) if values else MeanInterval(0.0, 0.0)
    label = ", ".join(f"{name.rpartition('.')[2]} {shown(value)}" for name, value in result.params.items())
    return PlottedPoint(label, values, interval.mean, interval.finite_half_width)


def _optuna_plots(study: optuna.Study, folder: Path) -> list[Path]:
    from optuna.visualization import matplotlib as drawn

    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    written = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if complete:
            save_axes(drawn.plot_optimization_history(study), folder / "history.png")
            written.append(folder / "history.png")
        if any(trial.intermediate_values for trial in trials):
            save_axes(drawn.plot_intermediate_values(study), folder / "curves.png")
            written.append(folder / "curves.png")
        varied = {name for trial in complete for name in trial.params}
        if len(varied) > 1 and len(complete) >= MIN_TRIALS_FOR_IMPORTANCE and len({t.value for t in complete}) > 1:
            axes = drawn.plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
            save_axes(axes, folder / "importances.png")
            written.append(folder / "importances.png")
    return written
