"""Curves of a run, drawn from its metric rows without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perl_megatron.observability.json_lines import write_bytes

PANELS = (
    (
        "Reward (sampled)",
        (
            ("reward/mean", "reward"),
            ("reward/accuracy_original", "accuracy, original order"),
            ("reward/accuracy_permuted", "accuracy, permuted"),
        ),
    ),
    ("Held-out accuracy (greedy)", (("evaluation/accuracy", "accuracy"),)),
    ("Held-out flip rate", (("evaluation/flip_rate", "flip rate"),)),
)
"""Title and (metric, label) of each panel."""


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG with reward, held-out accuracy and flip rate over the steps."""
    # Half a second of every rank's start, for what one rank needs when it ends.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (panel, curves) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for name, label in curves:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None, markersize=3
                )
        axes.set_title(panel)
        axes.set_xlabel("step")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    write_bytes(path, content.getvalue())
