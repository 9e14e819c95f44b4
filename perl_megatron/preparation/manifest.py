"""Which stages are finished, and with which settings; what another setting makes stale is put aside, not deleted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perl_megatron.errors import UserError

FORMAT = 2
"""Goes up when the stages decide otherwise than before: then no folder goes on with what they decided."""
REPLACED = "replaced"
_EDGE_BYTES = 2**20


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits of values that can be written as JSON."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def file_fingerprint(path: Path) -> str:
    """Of a file's size, beginning and end: a whole table of hundreds of gigabytes would take too long to read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            for start in {0, max(0, size - _EDGE_BYTES)}:
                file.seek(start)
                digest.update(file.read(_EDGE_BYTES))
    except OSError as error:
        raise UserError(f"cannot read the table: {error.strerror}", where=str(path)) from error
    return digest.hexdigest()


class Manifest:
    """`manifest.json` of a pipeline's folder: the fingerprint of each stage's settings, and whether it is done."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / "manifest.json"
        self._stages: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                content = json.loads(self._path.read_text(encoding="utf-8"))
                self._stages = dict(content["stages"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"the manifest cannot be read: {error}", where=str(self._path), fix="use another folder"
                ) from error

    def is_finished(self, stage: str, mark: str) -> bool:
        """Whether the stage is done with these settings."""
        entry = self._stages.get(stage)
        return entry is not None and entry["fingerprint"] == mark and bool(entry["finished"])

    def is_stale(self, stage: str, mark: str) -> bool:
        """Whether the stage was begun with other settings, or never; it must not go on with files that are there."""
        entry = self._stages.get(stage)
        return entry is None or entry["fingerprint"] != mark

    def note(self, stage: str, mark: str, *, finished: bool) -> None:
        """Remember how far a stage is."""
        self._stages[stage] = {"fingerprint": mark, "finished": finished}
        self._write()

    def put_aside(self, stages: Sequence[str], paths: Sequence[Path]) -> Path | None:
        """Move files into a folder of their own under `replaced/`, and forget the stages; the folder, if there is one.

        An interruption in between leaves some files moved, and the manifest as it was: the next start moves the rest.
        """
        present = [path for path in paths if path.exists()]
        if not present and not any(stage in self._stages for stage in stages):
            return None
        target = self._unused_folder() if present else None
        for path in present:
            assert target is not None
            path.rename(target / path.name)
        for stage in stages:
            self._stages.pop(stage, None)
        self._write()
        return target

    def _unused_folder(self) -> Path:
        number = 1
        while (folder := self._folder / REPLACED / str(number)).exists():
            number += 1
        folder.mkdir(parents=True)
        return folder

    def _write(self) -> None:
        temporary = self._path.with_name(".manifest.json.tmp")
        temporary.write_text(json.dumps({"format": FORMAT, "stages": self._stages}, indent=1), encoding="utf-8")
        os.replace(temporary, self._path)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuses a second process on the same folder, as long as the first one lives."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "another process works on this folder", where=str(folder), fix="wait for it, or use another folder"
            ) from error
        yield
