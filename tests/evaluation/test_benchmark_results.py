"""Tables of results: counts and means by hand, what is missing, the paper's rows, differences of two evaluations."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from perl_megatron.errors import UserError
from perl_megatron.evaluation import results_command
from perl_megatron.evaluation.benchmark_results import (
    markdown,
    read_results,
    render,
    summarize,
    table_rows,
    write_results,
)
from perl_megatron.evaluation.benchmarks.item import Item
from perl_megatron.evaluation.benchmarks.registry import BENCHMARKS
from perl_megatron.evaluation.paper_table import COLUMNS, PUBLISHED, ResultRow, cells, own_row
from perl_megatron.evaluation.paper_table import markdown as paper_markdown
from perl_megatron.types import Record

REMI = BENCHMARKS["remi"]


def row(number, task, correct, *, problem=None, rollout=0, finish="stop"):
    return {
        "id": f"{task}/{number}",
        "task": task,
        "cluster": f"{task}/{number}",
        "rollout": rollout,
        "correct": correct,
        "problem": problem,
        "finish_reason": finish,
        "question_digest": "0",
    }


ROWS = [
    *(row(number, "Clocks", number < 3) for number in range(4)),
    row(0, "Charts", True),
    row(1, "Charts", False, problem="it has no image", finish="not asked"),
    row(2, "Charts", False, finish="length"),
    *(row(number, "Charts", False) for number in range(3, 10)),
]


def result(rows=ROWS, benchmark=REMI, limit=None):
    items = [Item(Record(name, (), "", "", kind=""), "text", cluster=name) for name in {entry["id"] for entry in rows}]
    return summarize(benchmark, items, rows, seed=0, limit=limit)


def test_counts_and_means():
    summary = result()
    assert summary.tasks["Clocks"].accuracy.value == 0.75
    assert summary.tasks["Charts"].accuracy.value == 0.1  # what was not asked stays in the denominator
    assert summary.micro.value == pytest.approx(4 / 14)
    assert summary.macro.value == summary.value == pytest.approx(0.425)
    assert result(benchmark=BENCHMARKS["mmiu"]).value == pytest.approx(4 / 14)
    charts = summary.tasks["Charts"]
    assert (charts.num_questions, charts.num_not_asked, charts.num_cut) == (10, 1, 1)
    assert summary.reasons == {"it has no image": 1}
    assert charts.accuracy.low < 0.1 < charts.accuracy.high


def test_rollouts_are_no_questions():
    rows = [row(number, "Clocks", rollout == 0, rollout=rollout) for number in range(5) for rollout in range(4)]
    summary = result(rows)
    assert summary.whole.num_questions == 5
    assert summary.micro.value == 0.25
    assert summary.micro.low == summary.micro.high == 0.25  # all questions alike: only they are resampled


def test_table():
    assert table_rows(result())[0][:5] == ("Charts", "10", "1", "1", "10.00")
    assert [cells[0] for cells in table_rows(result())] == [
        "Charts",
        "Clocks",
        "micro (all questions)",
        "macro (mean of tasks)",
    ]
    text = markdown(result())
    assert "| Clocks | 4 | 0 | 0 | 75.00 |" in text
    assert "14 questions; 2600 are published" in text
    assert "- 1 × it has no image" in text
    assert "the first 14 questions" in markdown(result(limit=14))


def test_names_are_no_markup():
    """A task may be called anything; what it is called is shown."""
    rows = [row(0, "[/bold] [red]x", True), row(1, "y", False, problem="[/bold]")]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(result(rows)))
    assert "[/bold] [red]x" in console.export_text()


def test_means_of_the_paper_are_recomputed():
    means = [cells(entry)[-1] for entry in PUBLISHED]
    assert means == ["46.80", "51.13", "49.53", "50.91", "50.74", "48.68"]
    assert "46.80" in paper_markdown(PUBLISHED)


def test_missing_benchmarks_have_no_mean():
    row_ = ResultRow("mine", {"blink": 55.123, "remi": 36.0}, {"blink": 2.25})
    assert row_.mean is None
    assert cells(row_) == ("mine", "–", "55.12 ± 2.25", "–", "–", "–", "–", "36.00", "–", "–")
    whole = ResultRow("mine", dict.fromkeys(COLUMNS, 50.0), {})
    assert cells(whole)[-1] == "50.00"


def write(folder, rows=ROWS, limit=None):
    folder.mkdir()
    summary = result(rows, limit=limit)
    write_results(folder / "results.json", "a model", {"temperature": 0.0}, {"remi": summary})
    (folder / "remi.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return folder


def test_own_row(tmp_path):
    folder = write(tmp_path / "first.benchmarks")
    row_ = own_row(folder)
    assert row_.name == "first"
    assert row_.values == {"remi": pytest.approx(42.5)}
    assert row_.half_widths["remi"] > 1
    assert own_row(folder / "results.json").values == row_.values
    assert read_results(folder)["model"] == "a model"


def test_a_trial_is_not_the_benchmark(tmp_path):
    assert own_row(write(tmp_path / "trial.benchmarks", limit=14)).values == {}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 99}', '{"format": 1, "benchmarks": 3}'])
def test_no_results(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="results"):
        own_row(tmp_path)


def test_command(tmp_path, capsys):
    first = write(tmp_path / "first.benchmarks")
    better = [entry | {"correct": True} if entry["task"] == "Clocks" else entry for entry in ROWS]
    second = write(tmp_path / "second.benchmarks", better)
    results_command.run([first, second], markdown_file=tmp_path / "table.md", difference=True)
    printed = capsys.readouterr().out
    assert "PeRL (paper)" in printed
    assert "second.benchmarks minus first.benchmarks" in printed
    assert "+12.50" in printed  # macro: a quarter of one of two tasks
    assert "+7.14" in printed  # micro: 1 of 14
    assert "| second | – | – | – | – | – | – | 55.00 ±" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="two evaluations"):
        results_command.run([first], markdown_file=None, difference=True)
    with pytest.raises(UserError, match="cannot write"):
        results_command.run([], markdown_file=tmp_path / "nowhere" / "x.md", difference=False)


def test_difference_takes_shared_questions_only(tmp_path):
    first = write(tmp_path / "first.benchmarks")
    other = [entry | {"question_digest": "1"} if entry["id"] == "Charts/0" else entry for entry in ROWS]
    second = write(tmp_path / "second.benchmarks", other)
    table = results_command.difference_table(first, second)
    assert list(table.columns[1].cells) == ["13"]
