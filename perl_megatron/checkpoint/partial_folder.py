"""A folder that is being written: under a temporary name, with a journal of what is finished, renamed when whole.

    .NAME.partial/…        the files
    .NAME.partial.jsonl    the journal: the plan's fingerprint, then one line for every finished group of files

A file counts as finished when it is on the disk and its description (size and digest) is in the journal. The journal
stands beside the folder, so that it is there until the folder has its name, wherever the process is killed. Whoever
writes holds a lock on it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from perl_megatron.checkpoint.disk import publish_folder, refuse_existing, write_failure
from perl_megatron.durable import sync_path
from perl_megatron.errors import UserError

Describe = Callable[[Path], dict[str, Any]]


def partial_path(target: Path) -> Path:
    """Where a conversion to ``target`` keeps what is not whole yet."""
    return target.with_name(f".{target.name}.partial")


class PartialFolder:
    """The folder until it has its name; a context, which gives up the lock at its end."""

    def __init__(self, target: Path, fingerprint: str, *, describe: Describe, resume: bool):
        """Begin, or (``resume``) go on where a conversion with the same fingerprint was interrupted.

        ``describe`` gives what the journal keeps of a file, to know it again; size is part of it.
        Raises UserError where ``target`` exists, the folder cannot be written, another conversion is writing there, an
        interrupted one is there and ``resume`` is not set, and where ``resume`` finds another conversion.
        """
        self.target, self.path = target, partial_path(target)
        self._describe = describe
        self.records: dict[int, Any] = {}
        """Finished groups: number → what the target's ``finish`` wants to know."""
        self.entries: dict[str, dict[str, Any]] = {}
        """Finished files: name → what ``describe`` gave."""
        self._journal = self.path.with_name(f"{self.path.name}.jsonl")
        refuse_existing(target)
        had_journal = self._journal.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._journal, self.path)
        except OSError as error:
            raise write_failure(error, "the target", self.path) from error
        try:
            refuse_existing(target)  # once more: whoever held the lock before may have finished it
            self._begin(fingerprint, resume=resume, had_journal=had_journal)
        except BaseException as error:
            if not had_journal:
                self._journal.unlink(missing_ok=True)
            os.close(self._lock)
            if isinstance(error, OSError):
                raise write_failure(error, "the target", self.path) from error
            raise

    def finish_group(self, number: int, files: tuple[str, ...], record: Any) -> None:
        """Wait until the files are on the disk, describe them, and record the group. UserError where that fails."""
        entries = {}
        for name in files:
            try:
                sync_path(self.path / name)
                entries[name] = self._describe(self.path / name)
            except OSError as error:
                raise write_failure(error, f"the file {name}", self.path) from error
        try:
            self._append({"group": number, "files": entries, "record": record})
        except OSError as error:
            raise write_failure(error, "the journal", self._journal) from error
        self._keep(number, entries, record)

    def publish(self) -> None:
        """Give the folder its name once everything is on the disk, then remove the journal.

        Raises UserError for a finished file that is not there as it was written, OSError where the system fails.
        """
        for name, entry in self.entries.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != entry["size"]:
                raise UserError(
                    "a file of the conversion was changed or removed meanwhile",
                    where=str(file),
                    fix="let nothing else write there, and go on with --resume",
                )
        publish_folder(self.path, self.target)
        self._journal.unlink()

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self.records:  # nothing to go on from: a new start needs no --resume
            shutil.rmtree(self.path, ignore_errors=True)
            self._journal.unlink(missing_ok=True)
        os.close(self._lock)

    def _begin(self, fingerprint: str, *, resume: bool, had_journal: bool) -> None:
        if os.path.lexists(self.path):
            if not resume or not had_journal:
                raise UserError(
                    "an interrupted conversion is there"
                    if had_journal
                    else "what is there has no journal, so nobody can go on with it",
                    where=str(self.path),
                    fix=f"go on with --resume, or remove {self.path}" if had_journal else f"remove {self.path}",
                )
            if self._take_up(fingerprint):
                return
        os.truncate(self._journal, 0)
        self.path.mkdir()
        self._append({"fingerprint": fingerprint})
        sync_path(self.path.parent)

    def _take_up(self, fingerprint: str) -> bool:
        """Keep the finished files and remove all others; False where the journal has recorded nothing."""
        lines, num_bytes = _read_journal(self._journal)
        if not lines:
            shutil.rmtree(self.path)
            return False
        if lines[0] != {"fingerprint": fingerprint}:
            raise UserError(
                "what was begun there is another conversion: another source, or other options",
                where=str(self.path),
                fix=f"repeat the options of the interrupted conversion, or remove {self.path} to start over",
            )
        # A bad line must not stand before the next one.
        os.truncate(self._journal, num_bytes)
        for line in lines[1:]:
            if all(self._is_whole(name, entry) for name, entry in line["files"].items()):
                self._keep(line["group"], line["files"], line["record"])
        for path in self.path.iterdir():
            if path.name not in self.entries:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return True

    def _is_whole(self, name: str, entry: dict[str, Any]) -> bool:
        file = self.path / name
        return file.is_file() and file.stat().st_size == entry["size"] and self._describe(file) == entry

    def _keep(self, number: int, entries: dict[str, dict[str, Any]], record: Any) -> None:
        self.records[number] = record
        self.entries |= entries

    def _append(self, line: dict[str, Any]) -> None:
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def _lock(journal: Path, folder: Path) -> int:
    """An open file that holds the lock. UserError where another conversion has it."""
    while True:
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if journal.exists() and os.path.samestat(os.fstat(descriptor), journal.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                "another conversion is writing this target",
                where=str(folder),
                fix="wait until it has ended, or choose another name",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a journal that was removed between opening and locking


def _read_journal(journal: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines before the first that is cut off or damaged, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    num_bytes = 0
    for text in journal.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        expected = {"group", "files", "record"} if lines else {"fingerprint"}
        if not text.endswith(b"\n") or not isinstance(line, dict) or line.keys() != expected:
            break
        lines.append(line)
        num_bytes += len(text)
    return lines, num_bytes
