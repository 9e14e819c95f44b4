"""Prompts as data: Markdown files with the headings `# System` and `# User`, in whose texts ${names} are filled in."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from perl_megatron.chat.messages import Message
from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER

FOLDER = Path(__file__).parent / "prompts"
_HEADING = re.compile(r"^# (System|User)[ \t]*\n", re.MULTILINE)
_MARK = re.compile(r"\[IMAGE (\d+)\]")


@dataclass(frozen=True)
class Prompt:
    """A system and a user message with names to be filled in."""

    system: str
    user: str

    def messages(self, values: Mapping[str, object], images: tuple[Path, ...] = ()) -> tuple[Message, ...]:
        """The messages, with the images before the user's text: the text names them [IMAGE 1], [IMAGE 2], …"""
        system = string.Template(self.system).substitute(values)
        shown: list[str | Path | bytes] = []
        for number, image in enumerate(images, start=1):
            shown += [f"[IMAGE {number}]: ", image, "\n"]
        user = string.Template(self.user).substitute(values)
        return Message("system", (system,)), Message("user", (*shown, user))


def read_prompt(name: str, file: Path | None, names: Set[str]) -> Prompt:
    """The prompt of a stage: ``file``, or the package's own. All ``names`` have to stand in it, and no others.

    Raises ``UserError`` for a file that is no such prompt.
    """
    path = file if file is not None else FOLDER / f"{name}.md"
    where = f"{name}.prompt = {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt: {error}", where=where) from error
    pieces = _HEADING.split(text)
    parts = dict(zip(pieces[1::2], (piece.strip() for piece in pieces[2::2]), strict=True))
    if set(parts) != {"System", "User"} or len(pieces) != 5:
        raise UserError("a prompt has the headings '# System' and '# User', once each", where=where)
    templates = [string.Template(part) for part in parts.values()]
    is_valid = all(template.is_valid() for template in templates)
    if not is_valid or {each for template in templates for each in template.get_identifiers()} != names:
        wanted = ", ".join(f"${{{each}}}" for each in sorted(names))
        raise UserError(f"the prompt has to hold {wanted}, and no other $", where=where, fix="write $$ for a $")
    return Prompt(parts["System"], parts["User"])


def mark_images(text: str) -> str:
    """The text with its k-th placeholder as [IMAGE k]: models are trained on ``<image>`` as more than a word."""
    pieces = text.split(IMAGE_PLACEHOLDER)
    marked = pieces[0]
    for number, piece in enumerate(pieces[1:], start=1):
        marked += f"[IMAGE {number}]{piece}"
    return marked


def unmark_images(text: str, num_images: int) -> str:
    """The text with its marks as placeholders again. ValueError unless it holds each mark once, in order."""
    numbers = [int(number) for number in _MARK.findall(text)]
    if numbers != list(range(1, num_images + 1)) or IMAGE_PLACEHOLDER in text:
        raise ValueError(f"the images of the text are {numbers}, not 1 to {num_images} in order")
    return _MARK.sub(IMAGE_PLACEHOLDER, text)
