"""A row of a benchmark's table, read by column: texts, options, images, and the item that they make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from perl_megatron.data.image_store import ImageStore
from perl_megatron.data.tables import Row
from perl_megatron.errors import UserError
from perl_megatron.evaluation.benchmarks.extraction import without_letter
from perl_megatron.evaluation.benchmarks.item import Item
from perl_megatron.types import IMAGE_PLACEHOLDER, Grading, Record

IMAGE_FOLDERS = ("", "images", "../images")
"""Where files that a table names may lie, from the table's folder."""


@dataclass
class Fields:
    """One row. What is wrong with its question is collected in ``problem``; a row of another shape is an error."""

    row: Row
    store: ImageStore
    """Takes images that stand in the table itself."""
    counter: Counter[str]
    """How many items of each task there were before."""
    problem: str | None = field(default=None, init=False)

    def text(self, *keys: str) -> str:
        """The first of these columns that has a value, as text. UserError if none has."""
        for key in keys:
            value = self.row.values.get(key)
            if value is not None and str(value).strip():
                return str(value).strip()
        raise UserError(
            f"the row has no '{keys[0]}'; it has {', '.join(sorted(self.row.values))}",
            where=self.row.where,
            fix="give the benchmark's own table, or mend this row",
        )

    def optional(self, key: str) -> str:
        """A column as text; '' where there is none."""
        value = self.row.values.get(key)
        return "" if value is None else str(value).strip()

    def texts(self, key: str) -> tuple[str, ...]:
        """A column that holds a list of texts; () where there is none."""
        value = self.row.values.get(key)
        if value is None or value == "":
            return ()
        if not isinstance(value, list | tuple):
            raise UserError(f"'{key}' is no list: {str(value)[:80]!r}", where=self.row.where)
        return tuple(str(part).strip() for part in value if part is not None)

    def numbered(self, prefix: str, count: int) -> list[Any]:
        """The values of `prefix1` … that are not null."""
        values = [self.row.values.get(f"{prefix}{number}") for number in range(1, count + 1)]
        return [value for value in values if value is not None]

    def images(self, values: Sequence[Any]) -> tuple[Path, ...]:
        """Files of images: the bytes of a Hugging Face image go to the store, a file's name is looked up."""
        paths = []
        for value in values:
            try:
                paths.append(self._image(value))
            except UserError as error:
                self._report(error.what)
        return tuple(paths)

    def letter(self, answer: str, options: Sequence[str]) -> str:
        """The letter of the expected answer: a letter such as '(B)', or the text of one of the options."""
        match = re.fullmatch(r"\(?\s*([A-Za-z])\s*[).:]?", answer)
        if match is not None and (not options or ord(match[1].upper()) - ord("A") < len(options)):
            return match[1].upper()
        named = [index for index, option in enumerate(options) if option == answer]
        if len(named) != 1:
            self._report(f"the answer {answer[:40]!r} is none of its {len(options)} options")
            return "?"
        return chr(ord("A") + named[0])

    def number_in(self, task: str) -> str:
        """An id for a row that has none: its number among the task's rows."""
        return f"{task}/{self.counter[task]}"

    def item(
        self,
        id: str,
        task: str,
        text: str,
        images: Sequence[Path],
        answer: str,
        scorer: str,
        *,
        options: Sequence[str] = (),
        placeholder: str = IMAGE_PLACEHOLDER,
        unit: str = "",
        precision: int | None = None,
        absolute_tolerance: float = 0.0,
        relative_tolerance: float = 0.0,
        cluster: str = "",
    ) -> Item:
        """The item; ``placeholder`` is a pattern that stands in the text for image (1)."""
        try:
            text, images = place_images(text, images, placeholder)
        except UserError as error:
            self._report(error.what)
        if not images:
            self._report("it has no image")
        grading = Grading(
            options=tuple(without_letter(option, index) for index, option in enumerate(options)),
            absolute_tolerance=absolute_tolerance,
            relative_tolerance=relative_tolerance,
            unit=unit,
        )
        record = Record(
            id=id,
            images=tuple(images),
            text=text,
            answer=answer,
            answer_type=scorer,
            grading=grading,
            kind=task,
            source=self.row.where,
        )
        self.counter[task] += 1
        return Item(record, scorer, precision, cluster or id, self.problem)

    def _report(self, what: str) -> None:
        self.problem = self.problem or what

    def _image(self, value: Any) -> Path:
        if isinstance(value, dict):
            content = value.get("bytes")
            value = content if content is not None else value.get("path")
        if isinstance(value, bytes):
            return self.store.add(value)
        if not isinstance(value, str) or not value:
            raise UserError(f"it has an image that is {type(value).__name__}")
        name = PurePosixPath(value)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"the image path '{value}' leaves the table's folder")
        folder = Path(self.row.where.rpartition(":")[0]).parent
        for place in IMAGE_FOLDERS:
            path = folder / place / name
            if path.is_file():
                return path
        raise UserError(f"the image file {value} is missing")


Reader = Callable[[Fields], Item]


def place_images(text: str, images: Sequence[Path], placeholder: str) -> tuple[str, tuple[Path, ...]]:
    """Text with one ``<image>`` for each image, and the images in the order in which they then stand.

    Args:
        text: with some or all placeholders, or none.
        images: in the table's order.
        placeholder: a pattern. With a group for the image's number, '<image_(\\d+)>', the images follow the numbers,
            and later mentions of one become 'image k', k being its place. Without, the placeholders are in order.

    Images without a placeholder come first. UserError for a placeholder without an image.
    """
    if re.compile(placeholder).groups:
        text, shown = _place_numbered(text, len(images), placeholder)
    else:
        shown = list(range(len(images) - text.count(IMAGE_PLACEHOLDER), len(images)))
        if shown and shown[0] < 0:
            raise UserError(f"its text has {len(shown)} {IMAGE_PLACEHOLDER} for {len(images)} images")
    ahead = [index for index in range(len(images)) if index not in shown]
    if ahead:
        text = IMAGE_PLACEHOLDER * len(ahead) + ("" if text.startswith(IMAGE_PLACEHOLDER) else "\n") + text
    return text, tuple(images[index] for index in (*ahead, *shown))


def _place_numbered(text: str, num_images: int, placeholder: str) -> tuple[str, list[int]]:
    """The text with ``<image>`` at the first mention of each image, and the images (from 0) in that order."""
    if IMAGE_PLACEHOLDER in text:
        raise UserError(f"its text holds {IMAGE_PLACEHOLDER}, which stands for no image")
    numbers = list(dict.fromkeys(int(match[1]) for match in re.finditer(placeholder, text)))
    wrong = [number for number in numbers if not 1 <= number <= num_images]
    if wrong:
        raise UserError(f"its text names image {wrong[0]} of {num_images}")
    num_ahead = num_images - len(numbers)
    mentioned: set[int] = set()

    def replace(match: re.Match[str]) -> str:
        number = int(match[1])
        if number in mentioned:
            return f"image {num_ahead + numbers.index(number) + 1}"
        mentioned.add(number)
        return IMAGE_PLACEHOLDER

    return re.sub(placeholder, replace, text), [number - 1 for number in numbers]
