"""The last stage: from a question and its label to a record with its permutation contract.

The label is a language model's opinion, so it only says which contract is tried; the contract is then checked against
the record's text, and where it does not hold, the record's images must not move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perl_megatron.data.permutation import validate_contract
from perl_megatron.errors import UserError
from perl_megatron.preparation.question import OrderLabel, Question
from perl_megatron.types import IMAGE_PLACEHOLDER, AnswerRule, PermutationContract, Record, ReferenceRule

_REFERENCES = (ReferenceRule.INDEX, ReferenceRule.ORDINAL)


@dataclass(frozen=True)
class Contract:
    """A record as it is written, and why its images must not move (None: they may)."""

    record: Record
    reason: str | None

    def values(self) -> dict[str, Any]:
        """For the stage's raw outputs."""
        return {"movable": list(self.record.contract.movable), "answer": self.record.contract.answer.value} | (
            {} if self.reason is None else {"reason": self.reason}
        )


def give_contract(question: Question, folder: Path) -> Contract:
    """The question's record, with a contract that holds for every order."""
    record = question.record(folder)
    if len(question.images) < 2 or question.label is None:
        return Contract(record, "there are fewer than two images")
    contract = _tried_contract(question, question.label)
    if isinstance(contract, str):
        return Contract(record, contract)
    permuted = replace(record, contract=contract)
    try:
        validate_contract(permuted)
    except UserError as error:
        return Contract(record, error.what)
    return Contract(permuted, None)


def _tried_contract(question: Question, label: OrderLabel) -> PermutationContract | str:
    slots = tuple(range(len(question.images)))
    if label.is_multichoice_images:
        option_slots = _option_slots(question)
        if option_slots is None:
            return "the options are images, but do not show them"
        movable = tuple(slot for slot in option_slots if slot is not None)
        return PermutationContract(movable, _REFERENCES, AnswerRule.OPTION_LETTER, option_slots)
    if not label.should_change:
        return PermutationContract(slots, _REFERENCES, AnswerRule.UNCHANGED)
    return "the order changes the answer, and no rule says how"


def _option_slots(question: Question) -> tuple[int | None, ...] | None:
    """The slot of each option '<image>'; None for an option that shows no image. None if none does, or one several."""
    slots: list[int | None] = []
    slot = question.text.count(IMAGE_PLACEHOLDER)
    for option in question.options:
        num = option.count(IMAGE_PLACEHOLDER)
        if num > 1:
            return None
        slots.append(slot if num else None)
        slot += num
    return tuple(slots) if any(each is not None for each in slots) else None
