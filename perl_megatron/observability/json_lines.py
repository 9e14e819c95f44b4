"""JSON-lines files that survive a crash in the middle of a line, and files that appear whole.

Text is on the disk when it is written: a power failure must not take back what a run goes on from.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perl_megatron.durable import replace_file
from perl_megatron.errors import UserError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows, in order; a last line that was cut off is left out. An absent file has no rows.

    UserError names a line that is damaged.
    """
    if not path.exists():
        return []
    # By newline only: str.splitlines would also cut at U+2028 inside a response. What follows the last newline is torn.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            fix = "remove this line; no other row depends on it"
            raise UserError(f"the line is damaged: {line[:40]!r}", where=f"{path}:{number}", fix=fix)
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the whole file at once: it is either the old one or the new one."""
    write_text(path, "".join(to_line(row) for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write any text so."""
    replace_file(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a picture so, but without waiting for the disk; where it fails, nothing of it takes space."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def to_line(row: dict[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n"
