"""One HTML file that holds all of a run's story: summary, curves, evaluation by kind, sample rollouts, config.

It is self-contained (the plot is inlined) and needs no network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perl_megatron.observability.json_lines import read_rows, write_text
from perl_megatron.observability.metrics import find_metric
from perl_megatron.observability.plot import plot_curves
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.observability.summary import read_summary, summary_rows

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap }
img { max-width: 100% }
"""
NUM_SAMPLES = 6
"""Rollouts shown of the last recorded step."""


def write_report(folder: RunFolder) -> None:
    """Write `curves.png` and `report.html` from the run's metrics, summary (if there is one) and last rollouts."""
    rows = read_rows(folder.metrics)
    name = folder.root.name
    plot_curves(rows, folder.curves, title=name)
    image = base64.b64encode(folder.curves.read_bytes()).decode()
    parts = [f"<h1>{html.escape(name)}</h1>"]
    if folder.summary.is_file():
        parts += ["<h2>Summary</h2>", _table(summary_rows(read_summary(folder.summary)))]
    parts += ["<h2>Curves</h2>", f'<img alt="curves" src="data:image/png;base64,{image}">']
    parts += _evaluation_by_kind(rows)
    parts += _last_step(rows)
    parts += _samples(folder)
    config = html.escape(folder.config.read_text(encoding="utf-8"))
    parts += ["<h2>Config</h2>", f"<details><summary>config.yaml</summary><pre>{config}</pre></details>"]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
    write_text(folder.report, f"{page}<style>{STYLE}</style>{''.join(parts)}</html>\n")


def _evaluation_by_kind(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    evaluations = [row for row in rows if "evaluation/accuracy" in row]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in last if name.startswith("evaluation/")]
    body = [(name.removeprefix("evaluation/"), _number(first.get(name)), _number(last[name])) for name in names]
    header = ("held-out", f"step {first['step']}", f"step {last['step']}")
    return ["<h2>Evaluation</h2>", _table(body, header)]


def _last_step(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = [row for row in rows if "loss" in row]
    if not steps:
        return []
    body = []
    for name, value in steps[-1].items():
        metric = find_metric(name)
        if metric is not None:
            body.append((name, _number(value), metric.unit, metric.meaning))
    return [f"<h2>Step {steps[-1]['step']}</h2>", _table(body, ("metric", "value", "unit", "meaning"))]


def _samples(folder: RunFolder) -> list[str]:
    files = sorted(folder.rollouts.glob("step-*.jsonl"))
    if not files:
        return []
    parts = [f"<h2>Rollouts of {html.escape(files[-1].stem)}</h2>"]
    rows = read_rows(files[-1])
    for sample in rows[:: max(1, len(rows) // NUM_SAMPLES)][:NUM_SAMPLES]:
        images = "".join(_image(folder, key) for key in sample["images"])
        order = ", ".join(str(slot + 1) for slot in sample["order"])
        head = f"{sample['record']} · order {order} · answer {sample['answer']} · reward {sample['reward']}"
        text = f"{sample['question']}\n\n→ {sample['response']}"
        parts.append(f"<h3>{html.escape(head)}</h3>{images}<pre>{html.escape(text)}</pre>")
    return parts


def _image(folder: RunFolder, key: str) -> str:
    path = folder.rollouts / "images" / f"{key}.png"
    if not path.is_file():
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="image" style="max-height: 6rem; margin: .2rem" src="data:image/png;base64,{content}">'


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] | None = None) -> str:
    lines = ["<table>"]
    if header is not None:
        lines.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "".join([*lines, "</table>"])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"
