"""The last stage: from a question and its label to a record with its permutation contract.

The label is a language model's opinion: it only helps to choose the contract's template, and the contract is then
checked against the record's text (``data/contract/contract_templates.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from perl_megatron.data.contract.contract_templates import ContractTemplates, OrderLabel, apply_template, load_templates
from perl_megatron.errors import UserError
from perl_megatron.preparation.question import Dropped, Kept, Question
from perl_megatron.preparation.settings import OutputSettings
from perl_megatron.types import Record

FAMILY = "mantis"
"""The templates for free text: those of all questions that are not as their subset has them."""


@dataclass(frozen=True)
class Contracts:
    """Gives records their contracts."""

    settings: OutputSettings
    templates: ContractTemplates

    @classmethod
    def of(cls, settings: OutputSettings) -> Contracts:
        """With the templates of the settings; UserError for a file that holds none."""
        return cls(settings, load_templates(settings.templates))

    def record(self, question: Question, folder: Path) -> Record:
        """The question's record with its contract. UserError for one that is unusable itself."""
        label = None
        if question.label is not None:
            given = question.label
            label = OrderLabel(should_change=given.should_change, is_multichoice_images=given.is_multichoice_images)
        return apply_template(question.record(folder), self.templates, family=self.family(question), label=label)

    def outcome(self, question: Question, folder: Path) -> Kept | Dropped:
        """Whether the question's record is written, and its contract as a raw output."""
        try:
            contract = self.record(question, folder).contract
        except UserError as error:
            return Dropped(question.id, question.source, "the record is not usable", error.what)
        raw = {"permutable": contract.permutable, "answer": contract.answer.value, "reason": contract.reason}
        if contract.permutable or self.settings.keep_unpermutable:
            return Kept(question, raw)
        return Dropped(question.id, question.source, "its images must not move", contract.reason, raw)

    def family(self, question: Question) -> str:
        """The subset that the question comes from (the folder of its table), where that has templates of its own and
        the question is worded as there."""
        folders = PurePosixPath(question.source.rpartition(":")[0]).parent.parts
        found = [folder for folder in folders if folder in self.templates.families]
        return found[-1] if found and not question.question_type else FAMILY
