"""Permutation contracts by source, as data: which template fits a record, and the contract that it gives.

``contract_templates.yaml`` beside this file has the paper's sources; users can give a file of their own in its form
(docs/permutation.md). A template is a guess about records that it has not seen. So its contract is checked against each
record as a written one is, and text that may tell the images apart in another way (``unread_wordings``) refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from perl_megatron.config import yaml_source
from perl_megatron.data.contract.read_record import ReadRecord, option_images
from perl_megatron.data.contract.text_references import moving_references
from perl_megatron.data.contract.unread_answers import refuse_unread_answer
from perl_megatron.data.contract.unread_wordings import refuse_unread
from perl_megatron.data.permutation import validate_contract
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, PermutationContract, Record, ReferenceRule

DEFAULT_TEMPLATES = Path(__file__).with_suffix(".yaml")
DEFAULT_FAMILY = "default"
"""The family of templates for sources that have none of their own."""


def _compilable(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


_Pattern = Annotated[str, AfterValidator(_compilable)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OrderLabel(_Part):
    """What a language model said about a question, as far as it was asked; in a condition, what it has to have said."""

    should_change: bool | None = None
    """Whether another order of the images changes the answer."""
    is_multichoice_images: bool | None = None
    """Whether the options are images."""


class Conditions(_Part):
    """What a record has to be like. Conditions that are left out hold for all."""

    images: int | None = None
    min_images: int | None = None
    max_images: int | None = None
    options: int | None = None
    """How many options the text lists by letter."""
    min_options: int | None = None
    max_options: int | None = None
    text: _Pattern | None = None
    """A regular expression that the text holds."""
    answer: _Pattern | None = None
    """A regular expression for the whole answer."""
    placeholders_in_options: bool | None = None
    """Whether at least two options show one image each."""
    names_in_options: bool | None = None
    """Whether each option names one image, or like 'neither' and 'both' none or all, and at least two name one."""
    names_in_answer: bool | None = None
    """Whether the answer names images."""
    names_images: bool | None = None
    """Whether anything in the text or the answer names an image."""
    label: OrderLabel | None = None
    """What the label has to be; does not hold for records without one."""


class LastSlots(_Part):
    """The last images move."""

    last: int = Field(ge=2)


class Template(_Part):
    """One guess at the contract of a source's records."""

    name: str
    when: Conditions = Conditions()
    movable: Literal["all", "all_but_first", "options"] | LastSlots | None = None
    """Which images move; 'options': those that are options."""
    option_images: Literal["placeholders", "named", "in_order"] | None = None
    """How options stand for images: each shows one, each names one, or they are the movable images in turn."""
    references: tuple[ReferenceRule, ...] = ()
    answer: AnswerRule
    reason: str = ""
    """For ``not_permutable``: why."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.answer is AnswerRule.NOT_PERMUTABLE) != (self.movable is None):
            raise ValueError("either images are movable, or the answer is not_permutable")
        if (self.answer is AnswerRule.NOT_PERMUTABLE) != bool(self.reason):
            raise ValueError("a reason goes with not_permutable, and only with it")
        if (self.answer is AnswerRule.OPTION_LETTER) != (self.option_images is not None):
            raise ValueError("option_images goes with option_letter, and only with it")
        if self.movable == "options" and self.option_images == "in_order":
            raise ValueError("options in the order of the movable images need these to be given")
        return self


@dataclass(frozen=True)
class ContractTemplates:
    """The templates of each source, in the order in which they are tried."""

    families: Mapping[str, Sequence[Template]]

    def of(self, family: str) -> Sequence[Template]:
        """Those of a source, or the default's."""
        return self.families.get(family, self.families.get(DEFAULT_FAMILY, ()))


def load_templates(path: Path | None = None) -> ContractTemplates:
    """Read templates, the package's own by default.

    Raises ``UserError`` with file and line for unknown keys, wrong values and templates that contradict themselves.
    """
    path = DEFAULT_TEMPLATES if path is None else Path(path)
    root = yaml_source.read(path)
    if not isinstance(root, yaml.MappingNode):
        raise UserError("a file of templates lists them by source: `nlvr2: [{name: …, …}]`", where=str(path))
    values = yaml_source.plain(root, str(path))
    try:
        families = TypeAdapter(dict[str, tuple[Template, ...]]).validate_python(values)
    except ValidationError as error:
        # Of all complaints: an unknown key before what is missing for it, else the one deepest in the file.
        worst = max(error.errors(), key=lambda item: (item["type"] == "extra_forbidden", _place(root, item["loc"])[0]))
        key = ".".join(str(part) for part in worst["loc"])
        where = f"{path}:{_place(root, worst['loc'])[1]}"
        raise UserError(f"`{key}`: {worst['msg']}", where=where, fix="see docs/permutation.md") from error
    return ContractTemplates(families)


def _place(node: yaml.Node, location: Sequence[str | int]) -> tuple[int, int]:
    """How many parts of ``location`` the file has, and the 1-based line of the last of them."""
    depth, line = 0, yaml_source.line(node)
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                continue  # pydantic names the alternatives of a union too
            line, node = yaml_source.line(found[0][0]), found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = yaml_source.line(node)
        else:
            break
        depth += 1
    return depth, line


def apply_template(
    record: Record, templates: ContractTemplates, *, family: str, label: OrderLabel | None = None
) -> Record:
    """The record with the contract of the first template of ``family`` that fits, or one that says why none does.

    Any contract that the record has is replaced. ``label`` is an opinion about the question, if somebody was asked.
    Raises ``UserError`` only for a record that is unusable itself, such as one with a placeholder too few.
    """
    validate_contract(replace(record, contract=PermutationContract()))
    if len(record.images) < 2:
        return _not_permutable(record, "there are fewer than two images")
    read = ReadRecord(record)
    for template in templates.of(family):
        if not _holds(template.when, read, label):
            continue
        if template.answer is AnswerRule.NOT_PERMUTABLE:
            return _not_permutable(record, f"{template.name}: {template.reason}")
        try:
            contract = _contract(template, read)
            refuse_unread(record, contract)
            refuse_unread_answer(record, contract)
            permutable = replace(record, contract=contract)
            validate_contract(permutable)
            _check_label(permutable, label)
        except UserError as error:
            return _not_permutable(record, f"{template.name}: {error.what}")
        return permutable
    return _not_permutable(record, f"no template for '{family}' fits")


def _not_permutable(record: Record, reason: str) -> Record:
    return replace(record, contract=PermutationContract(answer=AnswerRule.NOT_PERMUTABLE, reason=reason))


def _check_label(record: Record, label: OrderLabel | None) -> None:
    """Refuse an answer that stays, beside a text that stays, where the label says that the order changes it."""
    contract = record.contract
    if label is None or not label.should_change or contract.answer is not AnswerRule.UNCHANGED:
        return
    moving = moving_references(record)
    references = [*moving.text, *(reference for option in moving.options for reference in option)]
    if not any(reference.render and reference.slots[0] in contract.movable for reference in references):
        raise UserError("by its label the answer changes with the order, but no reference says how")


def _holds(when: Conditions, read: ReadRecord, label: OrderLabel | None) -> bool:
    """Whether all conditions hold; the cheap ones are looked at first."""
    record, num_images, num_options = read.record, len(read.record.images), len(read.options)
    bounds = (
        (when.images, when.images, num_images),
        (when.min_images, when.max_images, num_images),
        (when.options, when.options, num_options),
        (when.min_options, when.max_options, num_options),
    )
    if any((low is not None and count < low) or (high is not None and count > high) for low, high, count in bounds):
        return False
    if when.label is not None and (label is None or not _label_holds(when.label, label)):
        return False
    if when.answer is not None and not re.fullmatch(when.answer, record.answer):
        return False
    if when.text is not None and not re.search(when.text, record.text):
        return False
    return (
        when.placeholders_in_options in (None, read.placeholders_in_options)
        and when.names_in_options in (None, read.names_in_options)
        and when.names_in_answer in (None, read.names_in_answer)
        and when.names_images in (None, read.names_images)
    )


def _label_holds(wanted: OrderLabel, label: OrderLabel) -> bool:
    return wanted.should_change in (None, label.should_change) and wanted.is_multichoice_images in (
        None,
        label.is_multichoice_images,
    )


def _contract(template: Template, read: ReadRecord) -> PermutationContract:
    """The contract that a template gives a record. Raises ``UserError`` if its images and options do not allow it."""
    num_images = len(read.record.images)
    movable: tuple[int, ...] = tuple(range(num_images))
    if template.movable == "all_but_first":
        movable = movable[1:]
    elif isinstance(template.movable, LastSlots):
        if template.movable.last > num_images:
            raise UserError(f"the last {template.movable.last} of {num_images} images should move")
        movable = movable[-template.movable.last :]
    option_slots = () if template.option_images is None else option_images(read, template.option_images, movable)
    if template.movable == "options":
        movable = tuple(sorted(slot for slot in option_slots if slot is not None))
    if len(movable) < 2:
        raise UserError("fewer than two images could move")
    return PermutationContract(movable, template.references, template.answer, option_slots)
