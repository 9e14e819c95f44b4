"""Rows of a user's tables: parquet, Arrow files of Hugging Face datasets, JSON lists and JSON lines, one at a time.

Memory is bounded by a batch of rows, also where rows hold whole images. (In parquet a page is decompressed whole, and
most writers end one only every 1,024 rows: where rows hold images, small row groups keep pages small.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from perl_megatron.errors import UserError

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json")
"""Of the files that are read; in a folder the first kind that is there (datasets have JSON files about themselves)."""
BATCH_BYTES = 16 * 2**20
"""Rows are read in batches of about this size."""
MAX_BATCH_ROWS = 1024
BUFFER_BYTES = 2**20
"""A parquet column is read through a buffer of this size instead of whole."""
MAX_ROW_BYTES = 256 * 2**20
"""A longer JSON row is taken for a corrupt file."""
COPY_AGAIN = "copy the file again: it is corrupt or incomplete"
SPACE = " \t\r\n"


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    where: str
    """``file:row``; rows count from 1, and in JSON-lines files they are the file's lines."""
    values: dict[str, Any]
    """By column. Bytes stay bytes; a nested column is a list or a dictionary."""


def rows(path: Path, *, on_broken: Callable[[str, str], None] | None = None) -> Iterator[Row]:
    """The rows of a file, or of all files in a folder and its subfolders, in sorted order of their names.

    ``on_broken`` is called with place and reason of each row that cannot be read as an object of columns, which is then
    left out; without it such a row is an error. Raises ``UserError`` for a path that is missing or of an unknown kind,
    an empty folder, and a file that is corrupt as a whole.
    """
    report = on_broken or _refuse
    for file in table_files(path):
        with _reading(file):
            if file.suffix == ".parquet":
                yield from _parquet_rows(file)
            elif file.suffix == ".arrow":
                yield from _arrow_rows(file)
            elif file.suffix == ".json" and _first_character(file) == "[":
                yield from _list_rows(file, report)
            else:
                yield from _line_rows(file, report)


def table_files(path: Path) -> list[Path]:
    """The files that ``rows`` reads. Hidden ones and those in hidden folders are left out."""
    path = Path(path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"unknown kind of file '{path.name}'", where=str(path), fix=f"give {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist", where=str(path), fix="check the path")
    for suffix in SUFFIXES:
        found = [
            file
            for file in sorted(path.rglob(f"*{suffix}"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if found:
            return found
    raise UserError("the folder holds no table", where=str(path), fix=f"put a file there ({', '.join(SUFFIXES)})")


def columns(path: Path) -> list[str]:
    """The names of the columns: those of the first row, or of a parquet file's schema."""
    first = table_files(path)[0]
    with _reading(first):
        if first.suffix == ".parquet":
            return list(pyarrow.parquet.read_schema(first).names)
    for row in rows(first, on_broken=lambda where, reason: None):
        return list(row.values)
    return []


def _refuse(where: str, reason: str) -> None:
    raise UserError(f"the row cannot be read: {reason}", where=where, fix="mend or remove it")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the table: {error}", where=str(file), fix=COPY_AGAIN) from error
    except OSError as error:  # pyarrow's own is an OSError without a system's reason
        raise UserError(f"cannot read the table: {error.strerror or error}", where=str(file), fix="check it") from error


def _parquet_rows(file: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
        metadata = table.metadata
        num_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        bytes_of_row = num_bytes // max(1, metadata.num_rows)
        batch_rows = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(1, bytes_of_row)))
        yield from _batch_rows(file, table.iter_batches(batch_size=batch_rows, use_threads=False))


def _arrow_rows(file: Path) -> Iterator[Row]:
    """Rows of what `datasets.Dataset.save_to_disk` writes (a stream of batches) or of an Arrow file."""
    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            yield from _batch_rows(file, (reader.get_batch(index) for index in range(reader.num_record_batches)))
        else:
            source.seek(0)
            yield from _batch_rows(file, pyarrow.ipc.open_stream(source))


def _batch_rows(file: Path, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 64):  # an Arrow file's batches can be large: few rows become objects
            for values in batch.slice(start, 64).to_pylist():
                number += 1
                yield Row(f"{file}:{number}", values)


def _line_rows(file: Path, report: Callable[[str, str], None]) -> Iterator[Row]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_ROW_BYTES):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            where = f"{file}:{number}"
            if len(line) >= MAX_ROW_BYTES:
                raise UserError(f"the line is longer than {MAX_ROW_BYTES} bytes", where=where, fix="check the file")
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                report(where, f"no JSON: {error}")
                continue
            yield from _checked(where, values, report)


def _list_rows(file: Path, report: Callable[[str, str], None]) -> Iterator[Row]:
    """The elements of a JSON list, decoded one at a time from a window of the file."""
    decoder = json.JSONDecoder()
    with file.open(encoding="utf-8-sig") as text:
        window = _Window(text.read, file)
        window.skip("[")
        number = 0
        while window.peek() != "]":
            number += 1
            if number > 1:
                window.skip(",")
            where = f"{file}:{number}"
            yield from _checked(where, window.decode(decoder, where), report)
        window.skip("]")
        window.skip("")


class _Window:
    """The part of a JSON text that is being decoded."""

    def __init__(self, read: Callable[[int], str], file: Path):
        self._read, self._file = read, file
        self._text, self._position = "", 0

    def peek(self) -> str:
        """The next character that is no space; '' at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in SPACE:
                self._position += 1
            if self._position < len(self._text) or not self._grow(BUFFER_BYTES):
                return self._text[self._position : self._position + 1]

    def skip(self, character: str) -> None:
        """Go past the next character, which has to be this one ('': the file's end)."""
        found = self.peek()
        if found != character:
            what = f"the JSON list is corrupt: there is {found!r} where {character!r} should be"
            raise UserError(what, where=str(self._file), fix=COPY_AGAIN)
        self._position += 1

    def decode(self, decoder: json.JSONDecoder, where: str) -> Any:
        """The next element. What follows it has to be in the window: `12` may be the beginning of `123`."""
        self.peek()
        more = BUFFER_BYTES
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._position)
                if end < len(self._text):
                    self._position = end
                    return value
                problem = "it ends too early"
            except (ValueError, RecursionError) as error:
                problem = str(error)
            if len(self._text) - self._position > MAX_ROW_BYTES or not self._grow(more):
                raise UserError(f"the JSON list is corrupt: {problem}", where=where, fix=COPY_AGAIN)
            more *= 2

    def _grow(self, count: int) -> bool:
        text = self._read(count)
        self._text, self._position = self._text[self._position :] + text, 0
        return bool(text)


def _checked(where: str, values: object, report: Callable[[str, str], None]) -> Iterator[Row]:
    if isinstance(values, dict):
        yield Row(where, values)
    else:
        report(where, f"it is no object of columns but {type(values).__name__}")


def _first_character(file: Path) -> str:
    with file.open("rb") as content:
        return content.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1].decode("latin-1")
