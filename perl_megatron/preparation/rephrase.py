"""The second stage: open questions become multiple choice, worded by a language model."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from perl_megatron.data.contract.options import letter
from perl_megatron.preparation.choices import reads_back
from perl_megatron.preparation.language_stage import Unusable
from perl_megatron.preparation.prompts import Prompt, mark_images, read_prompt, unmark_images
from perl_megatron.preparation.question import Question
from perl_megatron.preparation.settings import RephraseSettings

_ABOUT_THE_OTHERS = re.compile(r"(?:none|all|both|neither|any|either)\b.*\b(?:above|these|them|options?)\.?", re.I)


class RephrasedReply(BaseModel):
    """What the language model replies."""

    model_config = ConfigDict(extra="forbid")

    possible: bool
    question: str
    options: list[str]
    answer: str
    question_type: Literal["ReferenceComparison", "Other"]


@dataclass(frozen=True)
class Rephrase:
    """Asks about open questions, and checks what comes back."""

    settings: RephraseSettings
    prompt: Prompt
    seed: int
    name: str = "rephrase"
    reply_model: type[BaseModel] = RephrasedReply

    @classmethod
    def of(cls, settings: RephraseSettings, seed: int) -> Rephrase:
        """With the prompt of the settings; UserError for one that cannot be used."""
        names = {"question", "answer", "min_options", "max_options"}
        return cls(settings, read_prompt(cls.name, settings.prompt, names), seed)

    def asks(self, question: Question) -> bool:
        """Multiple choice stays as it is."""
        return not question.is_choice

    def values(self, question: Question) -> dict[str, object]:
        """What is filled into the prompt."""
        return {
            "question": mark_images(question.text),
            "answer": question.answer,
            "min_options": self.settings.min_options,
            "max_options": self.settings.max_options,
        }

    def judge(self, question: Question, reply: RephrasedReply) -> Question:
        """The question with options in a drawn order: models like to write the right one first."""
        if not reply.possible:
            raise Unusable("the model finds no multiple-choice question")
        if reply.question_type not in self.settings.keep_types:
            raise Unusable(f"the question type is {reply.question_type}")
        try:
            text = unmark_images(reply.question.strip(), len(question.images))
        except ValueError as error:
            raise Unusable("the images of the rephrased text are not those of the question", str(error)) from error
        options = [" ".join(option.split()) for option in reply.options]
        folded = [option.casefold() for option in options]
        if not self.settings.min_options <= len(options) <= self.settings.max_options:
            raise Unusable("too few or too many options", f"{len(options)}")
        if len(set(folded)) < len(options) or not all(options):
            raise Unusable("the options are not distinct texts", "; ".join(options))
        if any("[IMAGE" in option or "<image>" in option for option in options):
            raise Unusable("an option shows an image", "; ".join(options))
        if not reads_back(text, options):
            raise Unusable("the text holds what looks like other options", text)
        answer = " ".join(reply.answer.split()).casefold()
        if answer not in folded:
            raise Unusable("the answer is none of the options", reply.answer)
        order = list(range(len(options)))
        random.Random(f"{self.seed}:{question.id}").shuffle(order)
        order.sort(key=lambda index: bool(_ABOUT_THE_OTHERS.fullmatch(options[index])))  # "none of these" stays last
        return replace(
            question,
            text=text,
            options=tuple(options[index] for index in order),
            answer=letter(order.index(folded.index(answer))),
            question_type=reply.question_type,
        )
