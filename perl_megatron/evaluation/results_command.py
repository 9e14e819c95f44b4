"""`perl-megatron results`: finished evaluations beside the paper's rows, and how two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perl_megatron.errors import UserError
from perl_megatron.evaluation.benchmark_results import read_results
from perl_megatron.evaluation.bootstrap import Answer, paired_difference
from perl_megatron.evaluation.paper_table import PUBLISHED, markdown, own_row, render
from perl_megatron.observability.json_lines import read_rows

WIDTH = 180
"""Where there is no terminal."""
SEED = 0
"""Of the resampling of differences."""


def run(folders: Sequence[Path], *, markdown_file: Path | None, difference: bool) -> None:
    """Print the table, and write it; UserError for a folder without results."""
    if difference and len(folders) != 2:
        raise UserError(f"--difference compares two evaluations, not {len(folders)}", fix="name two folders")
    rows = [*PUBLISHED, *(own_row(folder) for folder in folders)]
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(render(rows))
    if difference:
        console.print(difference_table(folders[0], folders[1]))
    if markdown_file is not None:
        try:
            markdown_file.write_text(markdown(rows), encoding="utf-8")
        except OSError as error:
            where = f"--markdown {markdown_file}"
            raise UserError(f"cannot write the table: {error.strerror}", where=where, fix="check the folder") from error


def difference_table(first: Path, second: Path) -> Table:
    """The second's accuracies minus the first's, in points, on the questions that both were asked."""
    columns = ("benchmark", "questions", "micro", "95 % interval", "macro", "95 % interval")
    table = Table(*columns, title=escape(f"{second.name} minus {first.name}, paired, in points"))
    results = [read_results(folder)["benchmarks"] for folder in (first, second)]
    for name, result in results[0].items():
        if name not in results[1]:
            continue
        answers = [_answers(folder, name) for folder in (first, second)]
        shared = sorted(answers[0].keys() & answers[1].keys())
        if not shared:
            continue
        pair = [[answer for key in shared for answer in side[key]] for side in answers]
        estimates = paired_difference(pair[0], pair[1], seed=SEED)
        cells = []
        for kind in ("micro", "macro"):
            estimate = estimates[kind]
            cells += [f"{100 * estimate.value:+.2f}", f"{100 * estimate.low:+.2f} … {100 * estimate.high:+.2f}"]
        table.add_row(result["title"], str(len(shared)), *cells)
    return table


def _answers(folder: Path, name: str) -> dict[tuple[str, str], list[Answer]]:
    """The answers to each question of a benchmark, by id and digest of the question; the last of repeated rows."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for row in read_rows(folder / f"{name}.jsonl"):
        latest[row["id"], row["rollout"]] = row
    answers: dict[tuple[str, str], list[Answer]] = {}
    for row in latest.values():
        key = row["id"], row["question_digest"]
        answers.setdefault(key, []).append(Answer(row["task"], row["cluster"], float(row["correct"])))
    return answers
