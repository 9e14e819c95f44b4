"""Raw outputs on the disk: JSON lines, appended chunk by chunk, so that little is ever lost.

`RUNS/NAME.benchmarks/` holds `settings.json` (what the answers depend on), one `BENCHMARK.jsonl` for each benchmark
with a row for each answer, and `results.json` with `results.md` at the end. `RUNS/NAME.unfinished/` holds the answers
to the views of records until all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perl_megatron.checkpoint.model_digest import model_digest
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.evaluation.asking import evaluation_sampling
from perl_megatron.observability.json_lines import read_rows, to_line
from perl_megatron.types import Record, View


class OutputLog:
    """Rows of answers. Only rank 0 reads and writes them."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole rows; what an interruption left of a last one is cut off. UserError for a file that is no log."""
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(_end_of_last_line(file))
        try:
            return read_rows(self.path)
        except ValueError as error:
            raise UserError(
                f"a row of the answers cannot be read: {error}",
                where=str(self.path),
                fix="start afresh with evaluation.resume=false",
            ) from error

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows, and return when they are on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(to_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())


def output_folder(config: Config, kind: str = "benchmarks") -> Path:
    """Where the benchmarks of this `run.name` are kept, or another ``kind`` of answers."""
    return config.run.directory / f"{config.run.name}.{kind}"


def open_folder(config: Config, settings: dict[str, Any], kind: str = "benchmarks") -> Path:
    """Make the folder, or go on with the one that is there.

    Raises ``UserError`` where it holds answers to other settings, unless `evaluation.resume` is off: then the folder
    is put aside under another name.
    """
    folder = output_folder(config, kind)
    file = folder / "settings.json"
    if folder.exists() and not config.evaluation.resume:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, file)
        return folder
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("the settings cannot be read", where=str(file), fix="evaluation.resume=false") from error
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        lines = [f"\n  {key}: {before.get(key)!r} -> {settings.get(key)!r}" for key in changed]
        raise UserError(
            f"the answers that are there were given under other settings:{''.join(lines)}",
            where=str(folder),
            fix="set another run.name, or evaluation.resume=false to put those answers aside and start afresh",
        )
    return folder


def answer_settings(config: Config, who: str) -> dict[str, Any]:
    """All that answers depend on, besides the questions. ``who`` answers."""
    sampling, data = evaluation_sampling(config), config.data
    settings: dict[str, Any] = {
        "answers from": who,
        "system prompt": data.system_prompt,
        "max response tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "rollouts": sampling.num_rollouts,
        "min_pixels": data.min_pixels,
        "max_pixels": data.max_pixels,
    }
    if sampling.temperature > 0:
        settings["seed"] = config.run.seed
    if config.evaluation.ask == "engine":
        settings |= {
            "model": str(config.model.path.resolve()),
            "model digest": model_digest(config.model.path),
            "dtype": config.model.dtype,
            "max prompt tokens": data.max_prompt_tokens,
        }
    return settings


def question_digest(record: Record | View) -> str:
    """16 hexadecimal digits of what is asked: text and names of the images (in the store, hashes of their content)."""
    asked = json.dumps([record.text, [path.name for path in record.images]])
    return hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()


def _end_of_last_line(file: Any) -> int:
    """The number of bytes up to the last newline."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 2**16)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        position = start
    return 0
