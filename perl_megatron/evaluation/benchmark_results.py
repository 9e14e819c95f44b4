"""What came of the benchmarks: accuracies with intervals by task, micro and macro, as JSON, table and Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from perl_megatron.errors import UserError
from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.item import Item
from perl_megatron.evaluation.bootstrap import Answer, Estimate, bootstrap

FORMAT = 1
MAX_REASONS = 20
"""Reasons that the Markdown lists; the JSON has all."""
HEADER = ("task", "questions", "not asked", "cut", "accuracy", "95 % interval")


@dataclass(frozen=True)
class TaskResult:
    """One task of a benchmark."""

    num_questions: int
    num_not_asked: int
    """Questions that could not be asked, or got no answer; they count as wrong."""
    num_cut: int
    """Answers cut at the token limit."""
    accuracy: Estimate


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark, all tasks."""

    title: str
    source: str
    num_published: int
    """Questions of the published split; fewer were asked if ``limit`` is set or the copy is not whole."""
    limit: int | None
    headline: str
    """'micro' or 'macro': the one that stands in the table of all benchmarks."""
    micro: Estimate
    macro: Estimate
    whole: TaskResult
    """Over all tasks."""
    tasks: Mapping[str, TaskResult]
    reasons: Mapping[str, int]
    """Why questions were not asked, and how many."""

    def most_common_reasons(self) -> list[tuple[str, int]]:
        """Why questions were not asked, and how many, most common first."""
        return Counter(self.reasons).most_common()

    @property
    def value(self) -> float:
        """The headline's value, from 0 to 1."""
        return (self.macro if self.headline == "macro" else self.micro).value


def summarize(
    benchmark: Benchmark, items: Sequence[Item], rows: Sequence[Mapping[str, Any]], *, seed: int, limit: int | None
) -> BenchmarkResult:
    """The result of a benchmark from its rows."""
    cluster = {item.id: item.cluster for item in items}
    answers = [Answer(row["task"], cluster[row["id"]], float(row["correct"])) for row in rows]
    accuracies = bootstrap(answers, seed=seed)

    def task_result(chosen: Sequence[Mapping[str, Any]], accuracy: Estimate) -> TaskResult:
        return TaskResult(
            num_questions=len({row["id"] for row in chosen}),
            num_not_asked=len({row["id"] for row in chosen if row["problem"] is not None}),
            num_cut=sum(row["finish_reason"] == "length" for row in chosen),
            accuracy=accuracy,
        )

    return BenchmarkResult(
        title=benchmark.title,
        source=f"{benchmark.split} of {benchmark.source}",
        num_published=benchmark.num_items,
        limit=limit,
        headline=benchmark.headline,
        micro=accuracies.micro,
        macro=accuracies.macro,
        whole=task_result(rows, accuracies.micro),
        tasks={
            task: task_result([row for row in rows if row["task"] == task], estimate)
            for task, estimate in accuracies.by_task.items()
        },
        reasons=dict(Counter(row["problem"] for row in rows if row["problem"] is not None and row["rollout"] == 0)),
    )


def table_rows(result: BenchmarkResult) -> list[tuple[str, ...]]:
    """Cells under ``HEADER``: each task, then micro and macro."""
    tasks = result.tasks.items() if len(result.tasks) > 1 else ()
    rows = [_cells(name, task, task.accuracy) for name, task in tasks]
    rows.append(_cells("micro (all questions)", result.whole, result.micro))
    rows.append(_cells("macro (mean of tasks)", result.whole, result.macro))
    return rows


def render(result: BenchmarkResult) -> Table:
    """The table of one benchmark, for a terminal."""
    table = Table(title=escape(f"{result.title}{_note(result)}"))
    for name in HEADER:
        table.add_column(name, justify="left" if name == "task" else "right")
    for cells in table_rows(result):
        table.add_row(*map(escape, cells))
    return table


def markdown(result: BenchmarkResult) -> str:
    """The same as a Markdown section, with the reasons why questions were not asked."""
    lines = [f"## {result.title}{_note(result)}", "", f"Source: {result.source}.", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table_rows(result)]
    if result.reasons:
        lines += ["", "Not asked or not answered, and counted as wrong:", ""]
        reasons = result.most_common_reasons()
        lines += [f"- {count} × {' '.join(reason.split())}" for reason, count in reasons[:MAX_REASONS]]
        lines += [f"- … and {len(reasons) - MAX_REASONS} other reasons"] * (len(reasons) > MAX_REASONS)
    return "\n".join(lines) + "\n"


def write_results(path: Path, model: str, settings: Mapping[str, Any], results: Mapping[str, BenchmarkResult]) -> None:
    """All results as JSON, which ``read_results`` reads."""
    content = {
        "format": FORMAT,
        "model": model,
        "settings": dict(settings),
        "benchmarks": {name: asdict(result) | {"value": result.value} for name, result in results.items()},
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """A file of ``write_results``, or the one in this folder. UserError where it is none."""
    file = path / "results.json" if path.is_dir() else path
    fix = "give the folder RUNS/NAME.benchmarks of a finished `perl-megatron eval` with evaluation.benchmarks"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and isinstance(content["benchmarks"], dict):
            return content
    except OSError as error:
        raise UserError(f"cannot read the results: {error.strerror}", where=str(file), fix=fix) from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError("the file holds no results of benchmarks", where=str(file), fix=fix)


def _cells(name: str, task: TaskResult, accuracy: Estimate) -> tuple[str, ...]:
    interval = f"{100 * accuracy.low:.2f} - {100 * accuracy.high:.2f}"
    counts = (str(task.num_questions), str(task.num_not_asked), str(task.num_cut))
    return name, *counts, f"{100 * accuracy.value:.2f}", interval


def _note(result: BenchmarkResult) -> str:
    if result.limit is not None and result.whole.num_questions <= result.limit < result.num_published:
        return f" (the first {result.whole.num_questions} questions)"
    if result.whole.num_questions != result.num_published:
        return f" ({result.whole.num_questions} questions; {result.num_published} are published)"
    return ""
