"""The fifth stage: does the order of the images change the answer?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict

from perl_megatron.preparation.prompts import Prompt, mark_images, read_prompt
from perl_megatron.preparation.question import OrderLabel, Question
from perl_megatron.preparation.settings import LabelSettings


class LabelReply(BaseModel):
    """What the language model replies."""

    model_config = ConfigDict(extra="forbid")

    should_change: bool
    is_multichoice_images: bool


@dataclass(frozen=True)
class Label:
    """Asks about every question that has an order at all."""

    settings: LabelSettings
    prompt: Prompt
    name: str = "label"
    reply_model: type[BaseModel] = LabelReply

    @classmethod
    def of(cls, settings: LabelSettings) -> Label:
        """With the prompt of the settings; UserError for one that cannot be used."""
        return cls(settings, read_prompt(cls.name, settings.prompt, {"question", "options", "answer"}))

    def asks(self, question: Question) -> bool:
        """A single image has one order."""
        return len(question.image_sizes) > 1

    def values(self, question: Question) -> dict[str, object]:
        """What is filled into the prompt."""
        marked = mark_images(question.full_text())
        options = "\n".join(marked.split("\n")[-len(question.options) :]) if question.is_choice else "(none)"
        stem = mark_images(question.text)
        return {"question": stem, "options": options, "answer": question.answer}

    def judge(self, question: Question, reply: LabelReply) -> Question:
        """The question with its label."""
        label = OrderLabel(should_change=reply.should_change, is_multichoice_images=reply.is_multichoice_images)
        return replace(question, label=label)
