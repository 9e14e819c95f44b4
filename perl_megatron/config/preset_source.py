"""Presets: named settings of published methods, shipped as data (`config/presets/*.yaml`).

Each is a config file whose values are all commented with their source. It has no `base` and no `preset` of its own.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from perl_megatron.errors import UserError

FOLDER = Path(__file__).parent / "presets"


def preset_names() -> tuple[str, ...]:
    """All presets, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def preset_file(name: str, where: str) -> Path:
    """The file of a preset. UserError with the nearest names where there is none of that name."""
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UserError(f"there is no preset '{name}'", where=where, fix=f"{meant}there are {', '.join(names)}")
    return FOLDER / f"{name}.yaml"


def named_presets(value: Any, where: str) -> tuple[str, ...]:
    """The names in the value of the key `preset`: one, several with commas between, or a list; later ones win.

    Raises UserError for another type, and for names that do not exist.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UserError(
            "`preset` is a name or a list of names", where=where, fix=f"choose of {', '.join(preset_names())}"
        )
    names = tuple(part.strip() for part in parts)
    for name in names:
        preset_file(name, where)
    return names
