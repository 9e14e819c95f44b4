"""The order-bias report as a picture: accuracy by order, slots, and the split of the reward's variance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 24
PARTS = (("question", "questions"), ("order", "image orders"), ("sampling", "rollouts of one order"))


def plot_order_bias(report: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Write a PNG of a report (``evaluation/order_report.py``'s JSON)."""
    # Half a second of every rank's start, for what one rank needs when it ends.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: accuracy {report['accuracy']:.1%}, flip rate {report['flip_rate']:.1%}")
    orders, slots, variance = figure.subplots(1, 3, width_ratios=(2, 1.5, 1))
    _plot_orders(orders, report["by_order"])
    _plot_slots(slots, report["slots"])
    _plot_variance(variance, report["variance"])
    figure.savefig(path, dpi=110)


def _plot_orders(axes: Axes, by_order: list[dict[str, Any]]) -> None:
    by_order = [row for row in by_order if row["num_images"] > 1]
    shown = by_order[:MAX_BARS]
    labels = [" ".join(str(slot + 1) for slot in row["order"]) for row in shown]
    axes.bar(range(len(shown)), [row["accuracy"] for row in shown], color="tab:blue")
    axes.set_xticks(range(len(shown)), labels, rotation=90, fontsize="x-small")
    axes.set_ylim(0, 1)
    cut = f" (the first {MAX_BARS} of {len(by_order)})" if len(by_order) > MAX_BARS else ""
    axes.set_title(f"Accuracy by image order{cut}")


def _plot_slots(axes: Axes, slots: list[dict[str, Any]]) -> None:
    axes.set_title("By slot of the image in question")
    if not slots:
        axes.text(0.5, 0.5, "no question is about one image", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    places = list(range(len(slots)))
    series = (("accuracy", "accuracy"), ("answered_share", "share of answers"), ("expected_share", "share expected"))
    for index, (key, label) in enumerate(series):
        values = [0.0 if row[key] is None else row[key] for row in slots]
        axes.bar([place + 0.27 * (index - 1) for place in places], values, width=0.25, label=label)
    axes.set_xticks(places, [f"{row['slot'] + 1}/{row['num_images']}" for row in slots], fontsize="x-small")
    axes.set_xlabel("slot / number of images")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="x-small")


def _plot_variance(axes: Axes, variance: Mapping[str, Any]) -> None:
    axes.set_title("Sum of squares of the reward")
    total, bottom = variance["total_squares"], 0.0
    for part, label in PARTS:
        share = variance[f"{part}_squares"] / total if total > 0 else 0.0
        axes.bar([0], [share], bottom=bottom, label=f"between {label}: {share:.1%}")
        bottom += share
    axes.set_xticks([])
    axes.set_ylim(0, 1.4)
    axes.legend(fontsize="x-small", loc="upper center")
