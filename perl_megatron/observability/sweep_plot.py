"""The points of a sweep as a picture: every seed, and the mean with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MAX_POINTS = 40
"""More cannot be read in one picture."""


@dataclass(frozen=True)
class PlottedPoint:
    """One row of the picture."""

    label: str
    values: Sequence[float]
    """Of the seeds."""
    mean: float
    half_width: float | None
    """Of the mean's 95 % interval; None: not known."""


def plot_points(panels: Sequence[tuple[str, Sequence[PlottedPoint]]], path: Path) -> None:
    """Write a PNG with a panel for each metric, the first point on top; all panels have the same points."""
    rows = min(MAX_POINTS, max(len(points) for _, points in panels))
    figure = Figure(figsize=(2 + 4.5 * len(panels), 0.45 * rows + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (metric, points) in zip(all_axes, panels, strict=True):
        for row, point in enumerate(points[:rows]):
            axes.plot(point.values, [row - 0.15] * len(point.values), "o", color="tab:gray", markersize=4, alpha=0.6)
            axes.errorbar(point.mean, row + 0.1, xerr=point.half_width or 0, fmt="s", color="tab:blue", capsize=4)
        axes.set_xlabel(metric)
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].set_yticks(range(rows), [point.label for point in panels[0][1][:rows]])
    all_axes[0].invert_yaxis()
    figure.savefig(path, dpi=100)


def save_axes(axes: Axes, path: Path) -> None:
    """Write the figure that a library has drawn into, without any display."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    FigureCanvasAgg(figure)
    figure.set_size_inches(9, 5)
    figure.savefig(path, dpi=100, bbox_inches="tight")
