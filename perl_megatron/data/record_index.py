"""Where the records of a large file are: an index that is made once, by several processes, and kept beside the file.

Making it checks every record but for its images. It has 33 bytes for each record, so a file of millions is open in
seconds and needs little memory; records are read when they are drawn. Beside `train.jsonl` it is `.train.jsonl.index`,
which may be deleted at any time; one that does not belong to the file as it is, or to this version, is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from perl_megatron.data.records import DroppedRecord, parse_record
from perl_megatron.data.worker_pool import WorkerPool
from perl_megatron.errors import UserError
from perl_megatron.types import Record

logger = logging.getLogger(__name__)

ENTRY = np.dtype(
    [
        ("offset", "<i8"),  # of the line, in bytes
        ("line", "<i8"),  # its number, from 1
        ("id_hash", "<u8"),
        ("length", "<i4"),  # of the line, in bytes
        ("num_images", "<i4"),
        ("has_demonstration", "?"),
    ]
)
CHUNK_BYTES = 2**20
"""What one process checks at a time."""
MAX_LINE_BYTES = 64 * 2**20
END_BYTES = 65536
"""Of the beginning and of the end of a file: a part of its fingerprint."""

Check = Callable[[Record], None]
"""Refuses a record with UserError; of a module without torch, since workers run it."""


@dataclass(frozen=True)
class RecordIndex:
    """The good lines of a file, and the others."""

    entries: np.ndarray
    """``ENTRY`` [N], in the file's order."""
    dropped: tuple[DroppedRecord, ...]


@dataclass(frozen=True)
class _Chunk:
    """Lines that begin in [begin, end) of a file."""

    path: Path
    begin: int
    end: int
    check: Check


@dataclass(frozen=True)
class _Indexed:
    """What a worker found; lines are counted from the chunk's first one."""

    entries: np.ndarray
    dropped: list[tuple[int, str | None, str]]
    num_lines: int


def open_index(path: Path, *, check: Check, num_processes: int) -> RecordIndex:
    """The index of a file of records, from its cache where that is up to date.

    Args:
        path: JSON lines, one record each.
        check: what else has to hold for a record.
        num_processes: that share the work; 1: this process does it.

    Raises:
        UserError: the file cannot be read, or holds a line of more than ``MAX_LINE_BYTES``.
    """
    try:
        key = _key(path, check)
        kept = _load(path, key)
        if kept is None:
            logger.info("%s: checking its records, once", path)
            kept = _make(path, check, num_processes)
            _save(path, key, *kept)
    except OSError as error:
        raise UserError(f"cannot read the dataset: {error.strerror}", where=str(path), fix="check data.*") from error
    entries, dropped = kept
    return RecordIndex(entries, tuple(DroppedRecord(f"{path}:{line}", record, why) for line, record, why in dropped))


def id_hash(record_id: str) -> int:
    """64 bits of a hash of a record's id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")


def cache_file(path: Path) -> Path:
    """Where the index of a file is kept."""
    return path.with_name(f".{path.name}.index")


def _make(path: Path, check: Check, num_processes: int) -> tuple[np.ndarray, list[tuple[int, str | None, str]]]:
    size = path.stat().st_size
    chunks = (
        _Chunk(path, begin, min(size, begin + CHUNK_BYTES), check) for begin in range(0, max(1, size), CHUNK_BYTES)
    )
    parts: list[np.ndarray] = []
    dropped: list[tuple[int, str | None, str]] = []
    lines_before = 0
    for found in _indexed(chunks, min(num_processes, 1 + size // CHUNK_BYTES)):
        found.entries["line"] += lines_before
        parts.append(found.entries)
        dropped += [(line + lines_before, record, why) for line, record, why in found.dropped]
        lines_before += found.num_lines
    return np.concatenate(parts), dropped


def _indexed(chunks: Iterator[_Chunk], num_processes: int) -> Iterator[_Indexed]:
    if num_processes == 1:
        yield from map(_index_chunk, chunks)
        return
    with WorkerPool(_index_chunk, num_processes) as pool:
        for future in pool.in_order(chunks):
            yield future.result()


def _index_chunk(chunk: _Chunk) -> _Indexed:
    entries: list[tuple[int, int, int, int, int, bool]] = []
    dropped: list[tuple[int, str | None, str]] = []
    number = 0
    for offset, line in _lines(chunk):
        number += 1
        if not line.strip():
            continue
        record = parse_record(line, "", chunk.path.parent)
        if isinstance(record, DroppedRecord):
            dropped.append((number, record.id, record.reason))
            continue
        try:
            chunk.check(record)
        except UserError as error:
            dropped.append((number, record.id, error.what))
            continue
        has_demonstration = record.demonstration is not None
        entries.append((offset, number, id_hash(record.id), len(line), len(record.images), has_demonstration))
    return _Indexed(np.array(entries, dtype=ENTRY), dropped, number)


def _lines(chunk: _Chunk) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of each line that begins in the chunk."""
    with chunk.path.open("rb") as file:
        if chunk.begin > 0:
            file.seek(chunk.begin - 1)
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
        elif file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        offset = file.tell()
        while offset < chunk.end and (line := file.readline(MAX_LINE_BYTES)):
            if len(line) == MAX_LINE_BYTES:
                what = f"a line has more than {MAX_LINE_BYTES} bytes"
                raise UserError(what, where=f"{chunk.path}, byte {offset}", fix="write one record a line")
            yield offset, line
            offset += len(line)


def _key(path: Path, check: Check) -> str:
    """Says whether an index belongs to the file and to this version; the file is not read whole."""
    status = path.stat()
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(0, status.st_size - END_BYTES))
        digest.update(file.read(END_BYTES))
    checked_by = f"{check.__module__}.{check.__qualname__}"
    return f"{status.st_size} {status.st_mtime_ns} {digest.hexdigest()} {checked_by} {_code_digest()}"


@cache
def _code_digest() -> str:
    """Of what decides whether a record is good: another version may decide otherwise."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*package.glob("*.py"), *package.glob("data/*.py"), *package.glob("reward/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _load(path: Path, key: str) -> tuple[np.ndarray, list[tuple[int, str | None, str]]] | None:
    try:
        with np.load(cache_file(path), allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                return None
            entries = kept["entries"]
            dropped = [(int(line), record, str(why)) for line, record, why in json.loads(str(kept["dropped"]))]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # none there, or no whole one: it is made again
    return (entries, dropped) if entries.dtype == ENTRY and entries.ndim == 1 else None


def _save(path: Path, key: str, entries: np.ndarray, dropped: list[tuple[int, str | None, str]]) -> None:
    target = cache_file(path)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                np.savez(file, key=np.array(key), entries=entries, dropped=np.array(json.dumps(dropped)))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: its index could not be kept, every start will make it again: %s", path, error.strerror)
