"""Import of a foreign dataset: once, by several processes, into our JSON lines beside an image store.

    TARGET/records.jsonl  images/  dropped.jsonl  import.json

What is finished is noted in `import.json` now and then; an import that was interrupted goes on from there. The records
are `records.jsonl.part` until all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from perl_megatron.data.record_files import RECORDS_NAME
from perl_megatron.data.records import DroppedRecord
from perl_megatron.data.row_import import Converted, NumberedRow, RowSettings, convert_rows, readable_id
from perl_megatron.data.tables import rows, table_files
from perl_megatron.data.worker_pool import WorkerDied, WorkerPool
from perl_megatron.errors import UserError

STATE_NAME, DROPPED_NAME = "import.json", "dropped.jsonl"
BATCH_ROWS = 16
BATCH_BYTES = 8 * 2**20
"""A process gets so many rows at once, fewer if their images have more bytes."""
SAVE_SECONDS = 5.0
REASON_DETAILS = re.compile(r"'[^']*'|\[[^]]*\]|\([^)]*\)|\d+|:.*", re.DOTALL)


@dataclass
class ImportCounts:
    """What went in and what came out."""

    rows: int = 0
    records: int = 0
    images: int = 0
    """Of all records; one that several records share counts for each."""
    dropped: int = 0
    """Questions, and rows that held none."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of the dropped ones, without their details."""
    sources: Counter[str] = field(default_factory=Counter)
    """Records by the dataset that their rows name."""
    not_permutable: Counter[str] = field(default_factory=Counter)
    """Records whose images keep their places, by the reason without its details."""


def import_dataset(
    source: Path, settings: RowSettings, *, num_processes: int, on_progress: Callable[[ImportCounts], None]
) -> ImportCounts:
    """Import a file or folder of rows into ``settings.target``; goes on where an earlier call was interrupted.

    Args:
        source: parquet, Arrow, JSON or JSON lines, or a folder of such.
        settings: how rows become records.
        num_processes: that decode the images.
        on_progress: is told the counts after each batch.

    Raises:
        UserError: the source cannot be read, the target cannot be written or holds the import of something else, or no
            record came out.
    """
    try:
        with _Target(settings, _fingerprint(source, settings)) as target:
            if not target.complete:
                _import_rows(source, settings, target, num_processes, on_progress)
            return target.counts
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=str(settings.target), fix="free some space") from error


def _import_rows(
    source: Path,
    settings: RowSettings,
    target: _Target,
    num_processes: int,
    on_progress: Callable[[ImportCounts], None],
) -> None:
    todo = islice(_numbered(source), target.counts.rows, None)
    with WorkerPool(partial(convert_rows, settings=settings), num_processes) as pool:
        batches: list[list[NumberedRow]] = []
        for future in pool.in_order(_remembered(_batches(todo), batches)):
            batch = batches.pop(0)
            try:
                outcomes = future.result()
            except WorkerDied:
                outcomes = _one_by_one(batch, pool)
            target.take(outcomes)
            on_progress(target.counts)
    target.finish()


def _one_by_one(batch: list[NumberedRow], pool: WorkerPool[Any, Any]) -> list[list[Converted]]:
    """The rows of a batch that ended a process, each alone: only the one that did it is dropped."""
    outcomes = []
    for row in batch:
        try:
            outcomes += pool.submit([row]).result()
        except WorkerDied as error:
            outcomes.append([Converted(row.where, readable_id(row.values), None, error.what)])
    return outcomes


class _Target:
    """The files that an import writes."""

    def __init__(self, settings: RowSettings, fingerprint: dict[str, Any]):
        self.counts, self.complete = ImportCounts(), False
        self._folder, self._fingerprint = settings.target, fingerprint
        self._part = self._folder / f"{RECORDS_NAME}.part"
        self._ids: set[str] = set()
        self._saved_at = time.monotonic()

    def __enter__(self) -> _Target:
        self._folder.mkdir(parents=True, exist_ok=True)
        state = self._read_state()
        records = self._folder / RECORDS_NAME
        if state is not None and state["complete"]:
            self.complete = True
            return self
        if records.exists():
            if state is None:
                fix = "choose another folder"
                raise UserError("the folder holds records already", where=str(self._folder), fix=fix)
            os.replace(records, self._part)  # interrupted at the very end
        self._records = _continued(self._part, 0 if state is None else state["records_bytes"])
        self._dropped = _continued(self._folder / DROPPED_NAME, 0 if state is None else state["dropped_bytes"])
        with self._part.open("rb") as lines:
            self._ids.update(json.loads(line)["id"] for line in lines)
        return self

    def __exit__(self, *error: object) -> None:
        # Nothing is noted here: an interrupt can come in the middle of a row.
        if not self.complete:
            self._records.close()
            self._dropped.close()

    def take(self, outcomes: list[list[Converted]]) -> None:
        """Write what became of some rows."""
        for of_row in outcomes:
            self.counts.rows += 1
            for outcome in of_row:
                if outcome.line is None:
                    self._drop(DroppedRecord(outcome.where, outcome.id, outcome.reason))
                elif outcome.id in self._ids:
                    self._drop(DroppedRecord(outcome.where, outcome.id, "the id is used before"))
                else:
                    assert outcome.id is not None
                    self._ids.add(outcome.id)
                    self._records.write(outcome.line.encode() + b"\n")
                    self.counts.records += 1
                    self.counts.images += outcome.num_images
                    self.counts.sources[outcome.source] += 1
                    if outcome.not_permutable is not None:
                        self.counts.not_permutable[_class_of(outcome.not_permutable)] += 1
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._save(complete=False)

    def finish(self) -> None:
        """All rows are taken: the records get their name."""
        if not self.counts.records:
            fix = f"see {self._folder / DROPPED_NAME}"
            what = f"none of {self.counts.rows} rows became a record: {dict(self.counts.reasons.most_common(3))}"
            raise UserError(what, where=str(self._folder), fix=fix)
        self._save(complete=False)
        os.replace(self._part, self._folder / RECORDS_NAME)
        self._save(complete=True)
        self._records.close()
        self._dropped.close()
        self.complete = True

    def _drop(self, dropped: DroppedRecord) -> None:
        self._dropped.write(json.dumps(asdict(dropped)).encode() + b"\n")
        self.counts.dropped += 1
        self.counts.reasons[_class_of(dropped.reason)] += 1

    def _read_state(self) -> dict[str, Any] | None:
        """What an earlier call noted; sets the counts."""
        file = self._folder / STATE_NAME
        if not file.is_file():
            return None
        try:
            state: dict[str, Any] = json.loads(file.read_bytes())
            if state["of"] == self._fingerprint:
                noted = {name: Counter(one) if isinstance(one, dict) else one for name, one in state["counts"].items()}
                self.counts = ImportCounts(**noted)  # type: ignore[arg-type]
                return state
        except (ValueError, KeyError, TypeError):
            pass
        fix = "choose another folder, or remove this one"
        raise UserError("the folder holds the import of something else", where=str(self._folder), fix=fix)

    def _save(self, *, complete: bool) -> None:
        """Note what is done: first the files, then the note that they are so long."""
        for file in (self._records, self._dropped):
            file.flush()
            os.fsync(file.fileno())
        sizes = {"records_bytes": self._records.tell(), "dropped_bytes": self._dropped.tell()}
        state = {"of": self._fingerprint, "complete": complete, "counts": vars(self.counts), **sizes}
        temporary = self._folder / f".{STATE_NAME}.tmp"
        temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._folder / STATE_NAME)
        self._saved_at = time.monotonic()


def _class_of(reason: str) -> str:
    """The reason without its details, so that equal ones can be counted."""
    return " ".join(REASON_DETAILS.sub("…", reason).split())[:80]


def _continued(path: Path, num_bytes: int) -> IO[bytes]:
    """The file as it was when the state was saved, to be written on."""
    file = path.open("ab")
    if path.stat().st_size < num_bytes:
        raise UserError("the file is shorter than its import noted", where=str(path), fix="remove the folder")
    file.truncate(num_bytes)
    file.seek(0, os.SEEK_END)
    return file


def _fingerprint(source: Path, settings: RowSettings) -> dict[str, Any]:
    """Of what is imported, and how: an import goes on only with the same."""
    files = [
        [str(file.relative_to(source)) if file != source else file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in table_files(source)
    ]
    how = {name: getattr(settings, name) for name in ("format", "source", "all_turns", "answer_type", "prefix")}
    if settings.follow_links:  # only then, so that imports from before there was the setting can go on
        how["follow_links"] = True
    templates = hashlib.blake2b(repr(settings.templates).encode(), digest_size=16).hexdigest()
    return {"files": files, **how, "image_root": str(settings.image_root.resolve()), "templates": templates}


def _numbered(source: Path) -> Iterator[NumberedRow]:
    """All rows of the source, broken ones in their places."""
    root = source if source.is_dir() else source.parent
    broken: list[NumberedRow] = []
    for row in rows(source, on_broken=lambda where, reason: broken.append(NumberedRow(where, "", {}, reason))):
        yield from broken
        broken.clear()
        file, _, number = row.where.rpartition(":")
        name = Path(file).relative_to(root).with_suffix("").as_posix()
        yield NumberedRow(row.where, f"{name}:{number}", row.values)
    yield from broken


def _batches(numbered: Iterator[NumberedRow]) -> Iterator[list[NumberedRow]]:
    batch: list[NumberedRow] = []
    num_bytes = 0
    for row in numbered:
        batch.append(row)
        num_bytes += _held_bytes(row.values)
        if len(batch) == BATCH_ROWS or num_bytes > BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _held_bytes(value: object) -> int:
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_held_bytes, value.values()))
    return sum(map(_held_bytes, value)) if isinstance(value, list) else 0


def _remembered(batches: Iterator[list[NumberedRow]], kept: list[list[NumberedRow]]) -> Iterator[list[NumberedRow]]:
    for batch in batches:
        kept.append(batch)
        yield batch
