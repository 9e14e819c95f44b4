"""Records on disk: JSON lines beside their images.

One object a line, unknown keys refused; ``images`` are paths relative to the file's folder and stay inside it:

    {"id": "q1", "images": ["scans/a.png", "scans/b.png"], "text": "<image><image>\\nWhich digit is in image 2?",
     "answer": "7", "answer_type": "number", "kind": "lookup",
     "contract": {"movable": [0, 1], "references": ["index"], "answer": "unchanged", "option_slots": []}}

and, where they are needed, ``demonstration`` (for supervised training) and ``grading`` (see ``types.Grading``).
Reading checks everything, images included, so that nothing is found broken in the middle of a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perl_megatron.data.images import check_image
from perl_megatron.data.links import link_problem
from perl_megatron.data.permutation import validate_contract
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, Grading, PermutationContract, Record, ReferenceRule

NUM_LISTED = 5
"""How many dropped records an error message lists."""


@dataclass(frozen=True)
class DroppedRecord:
    """A record that is not used, and why."""

    where: str
    """``file:line``."""
    id: str | None
    """None where the line is too broken to tell."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}{'' if self.id is None else f' ({self.id})'}: {self.reason}"


@dataclass(frozen=True)
class Dataset:
    """The usable records of a file, in its order, and those that were dropped."""

    records: tuple[Record, ...]
    dropped: tuple[DroppedRecord, ...]


class _ContractLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    movable: tuple[int, ...] = ()
    references: tuple[ReferenceRule, ...] = ()
    answer: AnswerRule = AnswerRule.UNCHANGED
    option_slots: tuple[int | None, ...] = ()
    reason: str = ""


class _GradingLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    options: tuple[str, ...] = ()
    absolute_tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    relative_tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    unit: str = ""


class _RecordLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(min_length=1)
    images: tuple[str, ...]
    text: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    answer_type: str = "text"
    kind: str = ""
    grading: _GradingLine = Field(default_factory=_GradingLine)
    contract: _ContractLine = Field(default_factory=_ContractLine)
    demonstration: str | None = None


def read_records(path: Path, *, max_corrupt_fraction: float, follow_links: bool = False) -> Dataset:
    """Read, check and decode everything once.

    A record with a problem (bad JSON, unknown key, missing or corrupt image, placeholders that do not match, a
    contradictory contract, an id seen before, without ``follow_links`` an image that a link takes from elsewhere) is
    dropped and named. Raises ``UserError`` if the file is missing or
    empty, if no record is left, or if more than ``max_corrupt_fraction`` of the records are dropped.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the dataset: {error.strerror}", where=str(path), fix="check data.*") from error
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError("the dataset is empty", where=str(path), fix="write one JSON object a line")

    parsed = [parse_record(line, where, path.parent) for where, line in numbered]
    if not follow_links:
        parsed = [record if isinstance(record, DroppedRecord) else _in_place(record) for record in parsed]
    broken_images = _broken_images(record for record in parsed if isinstance(record, Record))
    records: dict[str, Record] = {}
    dropped: list[DroppedRecord] = []
    for record in parsed:
        if isinstance(record, DroppedRecord):
            dropped.append(record)
        elif broken := [broken_images[image] for image in record.images if image in broken_images]:
            dropped.append(DroppedRecord(record.source, record.id, broken[0]))
        elif record.id in records:
            reason = f"the id is used before, by {records[record.id].source}"
            dropped.append(DroppedRecord(record.source, record.id, reason))
        else:
            records[record.id] = record
    if not records or len(dropped) > max_corrupt_fraction * len(numbered):
        raise too_many_dropped(str(path), dropped, num_records=len(numbered), max_corrupt_fraction=max_corrupt_fraction)
    return Dataset(tuple(records.values()), tuple(dropped))


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write JSON lines (to a temporary name, then renamed). Raises ``UserError`` for an image outside the folder."""
    path = Path(path)
    lines = [json.dumps(record_to_json(record, path.parent), ensure_ascii=False) + "\n" for record in records]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def record_to_json(record: Record, folder: Path) -> dict[str, object]:
    """The object of a record's line in a file in ``folder``. Raises ``UserError`` for an image outside the folder."""
    images = [PurePosixPath(Path(os.path.relpath(image, folder)).as_posix()) for image in record.images]
    outside = [str(image) for image in images if ".." in image.parts]
    if outside:
        raise UserError(
            f"the image {outside[0]} lies outside the dataset's folder",
            where=f"{folder}",
            fix="copy the images beside it",
        )
    contract = record.contract
    reason = {"reason": contract.reason} if contract.reason else {}
    line: dict[str, object] = {
        "id": record.id,
        "images": [str(image) for image in images],
        "text": record.text,
        "answer": record.answer,
        "answer_type": record.answer_type,
        "kind": record.kind,
        "contract": {
            "movable": list(contract.movable),
            "references": [rule.value for rule in contract.references],
            "answer": contract.answer.value,
            "option_slots": list(contract.option_slots),
            **reason,
        },
    }
    if record.grading != Grading():
        line["grading"] = asdict(record.grading)
    if record.demonstration is not None:
        line["demonstration"] = record.demonstration
    return line


def parse_record(line: bytes, where: str, folder: Path) -> Record | DroppedRecord:
    """The record on a line of a file in ``folder``, with its contract checked; its images are not opened yet."""
    try:
        parsed = _RecordLine.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        return DroppedRecord(where, None, f"{key}: {first['msg']}" if key else first["msg"])
    problems = [problem for image in parsed.images if (problem := _path_problem(image)) is not None]
    if problems:
        return DroppedRecord(where, parsed.id, problems[0])
    record = Record(
        id=parsed.id,
        images=tuple(folder / image for image in parsed.images),
        text=parsed.text,
        answer=parsed.answer,
        answer_type=parsed.answer_type,
        grading=Grading(**dict(parsed.grading)),
        contract=PermutationContract(**dict(parsed.contract)),
        demonstration=parsed.demonstration,
        kind=parsed.kind,
        source=where,
    )
    try:
        validate_contract(record)
    except UserError as error:
        return DroppedRecord(where, record.id, error.what)
    return record


def _in_place(record: Record) -> Record | DroppedRecord:
    problem = link_problem(record)
    return record if problem is None else DroppedRecord(record.source, record.id, problem)


def _path_problem(image: str) -> str | None:
    """What is wrong with the path of an image, whether there is a file or not."""
    if image.startswith("/") or ".." in image.split("/"):
        return f"the image path '{image}' leaves the dataset's folder"
    if "\0" in image:  # lone surrogates are no JSON
        return f"the image path {image!a} has a character that no file's name can have"
    return None


def _broken_images(records: Iterable[Record]) -> dict[Path, str]:
    """What is wrong with each unusable image. Decoding leaves Python's lock, so threads share the work."""

    def problem(image: Path) -> str | None:
        try:
            check_image(image)
        except UserError as error:
            return f"{error.what} [{image}]"
        return None

    images = list(dict.fromkeys(image for record in records for image in record.images))
    with ThreadPoolExecutor() as pool:
        problems = zip(images, pool.map(problem, images), strict=True)
        return {image: what for image, what in problems if what is not None}


def too_many_dropped(
    where: str, dropped: Sequence[DroppedRecord], *, num_records: int, max_corrupt_fraction: float
) -> UserError:
    """The refusal of data of which more than ``max_corrupt_fraction`` cannot be used; the first ones are listed."""
    listed = [f"\n    {record}" for record in dropped[:NUM_LISTED]]
    if len(dropped) > NUM_LISTED:
        listed.append(f"\n    … and {len(dropped) - NUM_LISTED} more")
    return UserError(
        f"{len(dropped)} of {num_records} records cannot be used:{''.join(listed)}",
        where=where,
        fix=f"mend them; data.max_corrupt_fraction ({max_corrupt_fraction:g}) sets the share that may be dropped",
    )
