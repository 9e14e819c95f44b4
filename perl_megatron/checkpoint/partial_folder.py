"""A folder that is being written: under a temporary name, with a journal of what is finished, renamed when whole.

    .NAME.partial/conversion.jsonl    first the plan's fingerprint, then one line for every finished group of files
    .NAME.partial/…                   the files

A file counts as finished when it is on the disk and its description (size and digest) is in the journal.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perl_megatron.checkpoint.safetensors_writer import sync_folder, write_failure
from perl_megatron.errors import UserError

_JOURNAL = "conversion.jsonl"


Describe = Callable[[Path], dict[str, Any]]


class PartialFolder:
    """The folder until it has its name."""

    def __init__(self, target: Path, fingerprint: str, *, describe: Describe, resume: bool):
        """Begin, or go on where a conversion with the same fingerprint was interrupted.

        ``describe`` gives what the journal keeps of a file, to know it again.
        Raises UserError where ``target`` exists, the folder cannot be written, or ``resume`` finds another conversion.
        """
        refuse_existing(target)
        self.target = target
        self._describe = describe
        self.path = target.with_name(f".{target.name}.partial")
        self.records: dict[int, Any] = {}
        """Finished groups: number → what the target's ``finish`` wants to know."""
        self.entries: dict[str, dict[str, Any]] = {}
        """Finished files: name → size and digest."""
        try:
            if resume and (self.path / _JOURNAL).is_file():
                self._take_up(fingerprint)
                return
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            self._append({"fingerprint": fingerprint})
        except OSError as error:
            raise write_failure(error, "the target", self.path) from error

    def finish_group(self, number: int, files: tuple[str, ...], record: Any) -> None:
        """Wait until the files are on the disk, digest them, and record the group. OSError where that fails."""
        entries = {}
        for name in files:
            descriptor = os.open(self.path / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            entries[name] = self._describe(self.path / name)
        self._append({"group": number, "files": entries, "record": record})
        self._keep(number, entries, record)

    def publish(self) -> None:
        """Remove the journal, and give the folder its name once everything is on the disk. OSError if that fails."""
        (self.path / _JOURNAL).unlink()
        sync_folder(self.path)
        if self.target.exists():
            raise FileExistsError(errno.EEXIST, "the target has appeared meanwhile", str(self.target))
        self.path.rename(self.target)

    def _take_up(self, fingerprint: str) -> None:
        text = (self.path / _JOURNAL).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut off
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or lines[0].get("fingerprint") != fingerprint:
            raise UserError(
                "what was begun there is another conversion: another source, or other options",
                where=str(self.path),
                fix="repeat the options of the interrupted conversion, or start over without --resume",
            )
        for line in lines[1:]:
            if all(self._is_whole(name, entry) for name, entry in line["files"].items()):
                self._keep(line["group"], line["files"], line["record"])
        # A cut-off line must not stand before the next one.
        os.truncate(self.path / _JOURNAL, len(whole.encode()))

    def _is_whole(self, name: str, entry: dict[str, Any]) -> bool:
        file = self.path / name
        return file.is_file() and file.stat().st_size == entry["size"] and self._describe(file) == entry

    def _keep(self, number: int, entries: dict[str, dict[str, Any]], record: Any) -> None:
        self.records[number] = record
        self.entries |= entries

    def _append(self, line: dict[str, Any]) -> None:
        with (self.path / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def refuse_existing(target: Path) -> None:
    """UserError where ``target`` exists."""
    if target.exists():
        raise UserError("the target exists", where=str(target), fix="choose another name, or remove it")
