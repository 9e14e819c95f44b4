"""What is known of a benchmark besides how its rows are read, and how its items are loaded from local files."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perl_megatron.data.image_store import ImageStore
from perl_megatron.data.tables import Row, rows, table_files
from perl_megatron.errors import UserError
from perl_megatron.evaluation.benchmarks.fields import Fields, Reader
from perl_megatron.evaluation.benchmarks.item import Item

logger = logging.getLogger(__name__)

SPLITS = frozenset(("train", "validation", "val", "dev", "test", "testmini"))
"""Words in the names of files and folders that name a split."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    name: str
    """As in `evaluation.benchmarks`."""
    title: str
    """As in PeRL's table."""
    source: str
    """The Hugging Face dataset that a local copy is of."""
    split: str
    num_items: int
    """Of the published split."""
    columns: tuple[str, ...]
    """What a table has to have; said where it is another one."""
    read: Reader
    headline: Literal["micro", "macro"] = "micro"
    """Which mean stands in the table of all benchmarks."""
    other_names: tuple[str, ...] = ()
    """Further names of its folder or file."""
    without: frozenset[str] = frozenset()
    """Words in the names of files that belong to other parts of the dataset."""


def load_items(benchmark: Benchmark, path: Path, store: ImageStore) -> list[Item]:
    """All items of a local copy, in its order; images that stand in the tables go to ``store``.

    A row that repeats an item is left out (some datasets have the same rows in several files). Raises ``UserError`` for
    a table of another shape, two different items with one id, and a copy without rows.
    """
    items: dict[str, Item] = {}
    counter: Counter[str] = Counter()
    repeated = 0
    for row in _rows(benchmark, path):
        missing = [column for column in benchmark.columns if column not in row.values]
        if missing:
            raise UserError(
                f"this is no table of {benchmark.title}: it has no column {', '.join(missing)}",
                where=row.where,
                fix=f"the columns of {benchmark.source} are expected: {', '.join(benchmark.columns)}",
            )
        item = benchmark.read(Fields(row, store, counter))
        before = items.get(item.id)
        if before is None:
            items[item.id] = item
        elif (before.record.text, before.record.answer) == (item.record.text, item.record.answer):
            repeated += 1
        else:
            raise UserError(
                f"two different questions have the id {item.id!r}; the other is in {before.record.source}",
                where=row.where,
                fix="leave one copy of the benchmark in the folder",
            )
    if not items:
        raise UserError(f"the copy of {benchmark.title} has no rows", where=str(path))
    if repeated:
        logger.info("%s: %d rows repeat others and are left out", benchmark.title, repeated)
    if len(items) != benchmark.num_items:
        text = "%s: %d questions; the published %s split has %d"
        logger.warning(text, benchmark.title, len(items), benchmark.split, benchmark.num_items)
    return list(items.values())


def find_copy(benchmark: Benchmark, folder: Path) -> Path | None:
    """The folder or file under ``folder`` that is named after the benchmark; case and `-_` do not count."""
    names = {_plain(name) for name in (benchmark.name, benchmark.title, *benchmark.other_names)}
    names.add(_plain(benchmark.source.rpartition("/")[2]))
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [entry for entry in entries if _plain(entry.stem if entry.is_file() else entry.name) in names]
    return found[0] if found else None


def split_files(benchmark: Benchmark, path: Path) -> list[Path]:
    """The tables of the benchmark's split: those whose name, or a folder's, says so, where any names a split."""
    if path.is_file():
        return [path]
    files = table_files(path)
    words = {file: _words(file.relative_to(path)) for file in files}
    kept = [file for file in files if not (benchmark.without and benchmark.without <= words[file])]
    if any(words[file] & SPLITS for file in kept):
        kept = [file for file in kept if benchmark.split in words[file]]
    if not kept:
        raise UserError(
            f"the folder has no table of the split '{benchmark.split}': {', '.join(file.name for file in files[:8])}",
            where=str(path),
            fix=f"copy that split of {benchmark.source} there",
        )
    return kept


def _rows(benchmark: Benchmark, path: Path) -> Iterator[Row]:
    for file in split_files(benchmark, path):
        yield from rows(file)


def _words(path: Path) -> frozenset[str]:
    return frozenset(re.split(r"[^a-z0-9]+", str(path).lower()))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
