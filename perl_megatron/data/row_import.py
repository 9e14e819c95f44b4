"""Foreign rows as lines of our records: what the processes of an import do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from perl_megatron.data.answer_guess import guess_answer, lettered_options
from perl_megatron.data.contract.contract_templates import ContractTemplates, apply_template
from perl_megatron.data.image_store import MAX_IMAGE_BYTES, ImageStore
from perl_megatron.data.images import check_image
from perl_megatron.data.links import leaves
from perl_megatron.data.permutation import validate_contract
from perl_megatron.data.record_index import Check
from perl_megatron.data.records import DroppedRecord, parse_record, record_to_json
from perl_megatron.data.row_formats import FORMATS, RECORDS, Draft
from perl_megatron.errors import UserError
from perl_megatron.runtime.regular_file import read_regular
from perl_megatron.types import Grading, Record

IMAGES = "images"
"""The image store's folder in the target."""


@dataclass(frozen=True)
class RowSettings:
    """How rows become records; of modules without torch, since workers get it."""

    format: str
    """A key of ``row_formats.FORMATS``, or ``RECORDS``: images go to the store, everything else stays."""
    target: Path
    image_root: Path
    """Paths of images are relative to it, and stay inside it."""
    source: str
    """Name of the dataset, where rows do not say it."""
    follow_links: bool = False
    """Images may be symbolic links that leave the image root."""
    all_turns: bool = False
    """Every pair of turns of a conversation is a question, not only the first one."""
    answer_type: str | None = None
    """None: guessed for each answer."""
    prefix: str = ""
    """Begins every id."""
    check: Check | None = None
    """What else has to hold for a record."""
    templates: ContractTemplates | None = None
    """Give a record its contract, by its source; None: no record can be permuted."""


@dataclass(frozen=True)
class NumberedRow:
    """A row on its way to a process."""

    where: str
    default_id: str
    """Of a row that has none."""
    values: dict[str, Any]
    broken: str | None = None
    """Why it could not be read as a row at all."""


@dataclass(frozen=True)
class Converted:
    """What became of a row's question."""

    where: str
    id: str | None
    line: str | None
    """The line of the record; None where it was dropped."""
    reason: str = ""
    """Why it was dropped."""
    source: str = ""
    num_images: int = 0
    not_permutable: str | None = None
    """Why its images keep their places; None where they may move."""


def convert_rows(rows: Sequence[NumberedRow], *, settings: RowSettings) -> list[list[Converted]]:
    """For each row what became of its questions; no row raises anything."""
    return [_convert(row, settings) for row in rows]


def _convert(row: NumberedRow, settings: RowSettings) -> list[Converted]:
    if row.broken is not None:
        return [Converted(row.where, None, None, row.broken)]
    try:
        if settings.format == RECORDS:
            return [_finish(_own_record(row, settings), settings.source, settings, row)]
        drafts = FORMATS[settings.format](row.values)
    except (UserError, ValueError) as error:  # ValueError: what cannot be JSON or UTF-8
        return [_refused(row, readable_id(row.values), error)]
    outcomes = []
    for number, draft in enumerate(drafts if settings.all_turns else drafts[:1], start=1):
        default = row.default_id if number == 1 else f"{row.default_id}#{number}"
        record_id = settings.prefix + (draft.id or default)
        source = draft.source or settings.source
        try:
            record = _record(replace(draft, id=record_id), source, row.where, settings)
            outcomes.append(_finish(record, source, settings, row))
        except (UserError, ValueError) as error:
            outcomes.append(_refused(row, record_id, error))
    return outcomes


def _record(draft: Draft, source: str, where: str, settings: RowSettings) -> Record:
    guess = guess_answer(draft.text, draft.answer)
    answer, answer_type, options = guess.answer, guess.answer_type, guess.options
    if settings.answer_type is not None and settings.answer_type != answer_type:
        answer_type = settings.answer_type
        answer = draft.answer.strip()
        options = lettered_options(draft.text) if answer_type == "choice" else ()
    assert draft.id is not None
    return Record(
        id=draft.id,
        images=tuple(_stored(image, settings) for image in draft.images),
        text=draft.text,
        answer=answer,
        answer_type=answer_type,
        grading=Grading(options=options),
        kind=draft.kind or source,
        source=where,
    )


def _own_record(row: NumberedRow, settings: RowSettings) -> Record:
    record = parse_record(json.dumps(row.values).encode(), row.where, settings.image_root)
    if isinstance(record, DroppedRecord):
        raise UserError(record.reason)
    relative = [image.relative_to(settings.image_root).as_posix() for image in record.images]
    images = tuple(_stored(image, settings) for image in relative)
    return replace(record, id=settings.prefix + record.id, images=images)


def _finish(record: Record, source: str, settings: RowSettings, row: NumberedRow) -> Converted:
    if settings.templates is not None and settings.format != RECORDS:
        record = apply_template(record, settings.templates, family=family_of(source))
    validate_contract(record)
    if settings.check is not None:
        settings.check(record)
    line = json.dumps(record_to_json(record, settings.target), ensure_ascii=False)
    line.encode()  # a lone surrogate cannot be written
    again = parse_record(line.encode(), row.where, settings.target)
    if isinstance(again, DroppedRecord):
        raise UserError(again.reason)
    fixed = None if record.contract.permutable else record.contract.reason or "no contract"
    return Converted(row.where, record.id, line, source=source, num_images=len(record.images), not_permutable=fixed)


def _stored(image: bytes | str, settings: RowSettings) -> Path:
    """Where the store keeps an image, which has been decoded once."""
    content = image if isinstance(image, bytes) else _read(image, settings)
    check_image(Path("image" if isinstance(image, bytes) else image), content)
    return ImageStore(settings.target / IMAGES).add(content)


def _read(image: str, settings: RowSettings) -> bytes:
    root = settings.image_root
    if PurePosixPath(image).is_absolute() or ".." in image.split("/"):
        raise UserError(f"the image path '{image}' leaves the dataset's folder")
    if not settings.follow_links and leaves(root / image, root):
        raise UserError(f"the image '{image}' is a link that leaves its folder; --follow-links allows it")
    try:
        content = read_regular(root / image, MAX_IMAGE_BYTES)
    except OSError as error:
        raise UserError(f"cannot read the image: {error.strerror} [{image}]") from error
    if content is None:
        raise UserError(f"the image has more than {MAX_IMAGE_BYTES} bytes [{image}]")
    return content


def _refused(row: NumberedRow, record_id: str | None, error: Exception) -> Converted:
    reason = error.what if isinstance(error, UserError) else str(error)
    return Converted(row.where, record_id, None, reason.encode(errors="backslashreplace").decode())


def family_of(source: str) -> str:
    """The family of contract templates of a source: its name without owner or folder, in lower case."""
    return source.rstrip("/").rpartition("/")[2].lower()


def readable_id(values: dict[str, Any]) -> str | None:
    """The id of a row that could not be read, for reports."""
    value = values.get("id")
    return str(value) if isinstance(value, int | str) else None
