"""Import a local dataset for training: `python tools/import_dataset.py SOURCE TARGET [--format mantis] …`.

SOURCE is a parquet, Arrow, JSON or JSON-lines file, or a folder of such, in the form of Mantis-Instruct, MMK12, veRL or
EasyR1, plain rows of question, answer and images, or our own records. TARGET gets `records.jsonl`, `images/` (each
image once, named by its content) and `dropped.jsonl`, which names every row that could not be used. Then
`data.train=TARGET`. An interrupted import goes on when it is called again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from perl_megatron.data.contract.contract_templates import load_templates
from perl_megatron.data.dataset_import import DROPPED_NAME, ImportCounts, import_dataset
from perl_megatron.data.record_files import RECORDS_NAME
from perl_megatron.data.record_index import open_index
from perl_megatron.data.row_formats import FORMATS, RECORDS, detect_format
from perl_megatron.data.row_import import RowSettings
from perl_megatron.data.tables import columns, count_rows
from perl_megatron.errors import UserError
from perl_megatron.record_check import check_answer
from perl_megatron.reward.grade import ANSWER_TYPES


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="file or folder")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--format", choices=[*FORMATS, RECORDS], help="default: by the names of the columns")
    parser.add_argument("--name", help="of the dataset, where rows do not say it (default: the source's own)")
    parser.add_argument("--images", type=Path, help="folder that paths of images start from (default: the source's)")
    text = "images may be symbolic links that leave that folder, as in a cache of the Hugging Face hub"
    parser.add_argument("--follow-links", action="store_true", help=text)
    parser.add_argument("--prefix", default="", help="begins every id")
    parser.add_argument("--answer-type", choices=ANSWER_TYPES, help="of all answers (default: guessed for each)")
    parser.add_argument("--turns", choices=("first", "all"), default="first", help="of conversations")
    parser.add_argument("--contracts", type=Path, help="YAML of contract templates by source (default: the package's)")
    parser.add_argument("--processes", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--max-dropped", type=float, default=0.1, help="share of dropped rows that is no error")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> RowSettings:
    source: Path = options.source
    return RowSettings(
        format=options.format or detect_format(columns(source), where=str(source)),
        target=options.target,
        image_root=options.images or (source if source.is_dir() else source.parent),
        source=options.name or source.stem,
        follow_links=options.follow_links,
        all_turns=options.turns == "all",
        answer_type=options.answer_type,
        prefix=options.prefix,
        check=check_answer,
        templates=load_templates(options.contracts),
    )


def run(options: argparse.Namespace, console: Console) -> ImportCounts:
    settings = settings_of(options)
    num_rows = count_rows(options.source)
    description = TextColumn("{task.description}")
    with Progress(description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(f"{options.source.name} ({settings.format})", total=num_rows)

        def show(counts: ImportCounts) -> None:
            progress.update(task, completed=counts.rows)

        counts = import_dataset(options.source, settings, num_processes=options.processes, on_progress=show)
        progress.add_task("index", total=None)
        open_index(options.target / RECORDS_NAME, check=check_answer, num_processes=options.processes)
        return counts


def summary(counts: ImportCounts) -> Table:
    table = Table("", "", show_header=False)
    for name, number in [("rows", counts.rows), ("records", counts.records), ("images", counts.images)]:
        table.add_row(name, str(number))
    if len(counts.sources) > 1:
        for source, number in counts.sources.most_common():
            table.add_row(f"records of {source}", str(number))
    kept = sum(counts.not_permutable.values())
    for name, total, reasons in [
        ("records whose images keep their places", kept, counts.not_permutable),
        ("dropped", counts.dropped, counts.reasons),
    ]:
        table.add_row(name, str(total))
        for reason, number in reasons.most_common(10):
            table.add_row(f"  {reason}", str(number))
    return table


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(stderr=True)
    try:
        counts = run(options, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    console.print(summary(counts))
    print(f"train with data.train={options.target}")
    if counts.dropped > options.max_dropped * max(1, counts.rows):
        named, share = options.target / DROPPED_NAME, f"{options.max_dropped:.0%}"
        print(f"error: more than {share} of the rows were dropped; {named} says why", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
