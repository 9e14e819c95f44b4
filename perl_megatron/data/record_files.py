"""Files of records too large to be held: a sequence of records that are read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from perl_megatron.data.record_index import Check, RecordIndex, open_index
from perl_megatron.data.records import DroppedRecord, parse_record, too_many_dropped
from perl_megatron.errors import UserError
from perl_megatron.types import Record

RECORDS_NAME = "records.jsonl"
"""The file of records in a folder that `tools/import_dataset.py` wrote."""
IMPORT = "python tools/import_dataset.py"


class _File:
    """One open file; any number of threads may read."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._opened = self._state()

    def record(self, entry: np.void) -> Record:
        """The record of an index's entry. Raises UserError if the file was changed since it was opened."""
        where = f"{self.path}:{entry['line']}"
        if self._state() == self._opened:
            line = os.pread(self._descriptor, int(entry["length"]), int(entry["offset"]))
            record = parse_record(line, where, self.path.parent)
            if isinstance(record, Record):
                return record
        raise UserError("the dataset changed while it was in use", where=where, fix="start the run again")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, eq=False)
class RecordFiles(Sequence[Record]):
    """The records of several files, one file after the other; see ``open_record_files``."""

    files: tuple[_File, ...]
    entries: tuple[np.ndarray, ...]
    """For each file the index entries of its records."""
    dropped: tuple[DroppedRecord, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of records of each file."""
        return tuple(len(entries) for entries in self.entries)

    @property
    def max_images(self) -> int:
        """The most images that a record has."""
        return max((int(entries["num_images"].max()) for entries in self.entries if len(entries)), default=0)

    def with_demonstration(self) -> RecordFiles:
        """Only the records that have a demonstration."""
        kept = tuple(entries[entries["has_demonstration"]] for entries in self.entries)
        return RecordFiles(self.files, kept, self.dropped)

    def __len__(self) -> int:
        return sum(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if position >= 0:
            for file, entries in zip(self.files, self.entries, strict=True):
                if position < len(entries):
                    return file.record(entries[position])
                position -= len(entries)
        raise IndexError(index)

    def __iter__(self) -> Iterator[Record]:
        for file, entries in zip(self.files, self.entries, strict=True):
            yield from map(file.record, entries)


def open_record_files(
    paths: Sequence[Path], *, check: Check, num_processes: int, max_corrupt_fraction: float
) -> RecordFiles:
    """Open files of records by their indexes; images are not looked at.

    Args:
        paths: files of JSON lines.
        check: what else has to hold for a record.
        num_processes: that check the records of a file without an index.
        max_corrupt_fraction: share of all records that may be dropped: the corrupt ones, and those whose id was used
            before, in whichever file.

    Raises:
        UserError: a file is missing or empty, or too many records are dropped.
    """
    indexes = [open_index(path, check=check, num_processes=num_processes) for path in paths]
    for path, index in zip(paths, indexes, strict=True):
        if len(index.entries) + len(index.dropped) == 0:
            raise UserError("the dataset is empty", where=str(path), fix="write one JSON object a line")
    files = tuple(_File(path) for path in paths)
    entries, duplicates = _without_duplicates(files, indexes)
    dropped = (*(record for index in indexes for record in index.dropped), *duplicates)
    num_records = sum(len(index.entries) + len(index.dropped) for index in indexes)
    if not any(map(len, entries)) or len(dropped) > max_corrupt_fraction * num_records:
        where = ", ".join(map(str, paths))
        raise too_many_dropped(where, dropped, num_records=num_records, max_corrupt_fraction=max_corrupt_fraction)
    return RecordFiles(files, entries, dropped)


def record_files(paths: Sequence[Path], *, key: str) -> tuple[Path, ...]:
    """The files of records that a config's paths name: files, and folders that `tools/import_dataset.py` wrote.

    Raises UserError, naming the ``key``, for what is missing or is no file of records but a table to be imported.
    """
    return tuple(_record_file(Path(path), key) for path in paths)


def _record_file(path: Path, key: str) -> Path:
    if path.is_dir():
        if (path / RECORDS_NAME).is_file():
            return path / RECORDS_NAME
        unfinished = (path / f"{RECORDS_NAME}.part").is_file()
        what = f"the import into {path} is not finished" if unfinished else f"the folder {path} has no {RECORDS_NAME}"
        fix = "call it again: it continues" if unfinished else f"import it: {IMPORT} {path} FOLDER, then {key}=FOLDER"
        raise UserError(what, where=key, fix=fix)
    if not path.is_file():
        fix = f"paths in a config are relative to the current directory, {Path.cwd()}"
        raise UserError(f"the file {path} does not exist", where=key, fix=fix)
    if path.suffix in (".parquet", ".arrow"):
        fix = f"import it: {IMPORT} {path} FOLDER, then {key}=FOLDER"
        raise UserError(f"{path} is a table, not a file of records", where=key, fix=fix)
    return path


def _without_duplicates(
    files: Sequence[_File], indexes: Sequence[RecordIndex]
) -> tuple[tuple[np.ndarray, ...], list[DroppedRecord]]:
    """The entries whose id no entry before them has; equal hashes are only a suspicion."""
    hashes = np.concatenate([index.entries["id_hash"] for index in indexes])
    file_of = np.repeat(np.arange(len(files)), [len(index.entries) for index in indexes])
    begin_of = np.cumsum([0, *(len(index.entries) for index in indexes)])
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    suspects = order[np.unique(np.concatenate([repeats - 1, repeats]))] if len(repeats) else order[:0]
    first_with: dict[str, str] = {}
    kept = np.ones(len(hashes), dtype=bool)
    dropped = []
    for position in np.sort(suspects):
        number = int(file_of[position])
        record = files[number].record(indexes[number].entries[position - begin_of[number]])
        if record.id in first_with:
            kept[position] = False
            reason = f"the id is used before, by {first_with[record.id]}"
            dropped.append(DroppedRecord(record.source, record.id, reason))
        else:
            first_with[record.id] = record.source
    parts = np.split(kept, begin_of[1:-1])
    return tuple(index.entries[part] for index, part in zip(indexes, parts, strict=True)), dropped
