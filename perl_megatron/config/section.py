"""What all sections of a config have in common."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def as_texts(value: object) -> object:
    """A list of texts may be written as one, with commas, which is shorter on a command line."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def as_paths(value: object) -> object:
    """A list of paths; one path may stand alone, and several in one text, with commas."""
    if value is None:
        return ()
    texts = as_texts((value,) if isinstance(value, Path) else value)
    return tuple(Path(text) if isinstance(text, str) else text for text in texts) if isinstance(texts, tuple) else texts


def as_numbers(value: object) -> object:
    """A list of numbers; a single one may stand alone, and several in one text, with commas."""
    if isinstance(value, str):
        return tuple(float(text) for text in value.split(","))
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int | float) else value
