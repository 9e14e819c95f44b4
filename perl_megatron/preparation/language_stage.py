"""The stages that ask a language model about each question: rephrase, and label."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from perl_megatron.chat.client import ChatClient
from perl_megatron.chat.messages import ChatReply, ChatRequest, Message
from perl_megatron.preparation.prompts import Prompt
from perl_megatron.preparation.question import Dropped, Kept, Outcome, Question, Unanswered
from perl_megatron.preparation.settings import LanguageModelSettings


class LanguageStage(Protocol):
    """What a stage asks, and what it makes of the reply."""

    @property
    def name(self) -> str:
        """Of the stage."""
        ...

    @property
    def reply_model(self) -> type[BaseModel]:
        """What the language model replies."""
        ...

    @property
    def settings(self) -> LanguageModelSettings:
        """Its section."""
        ...

    @property
    def prompt(self) -> Prompt:
        """What is asked."""
        ...

    def asks(self, question: Question) -> bool:
        """Whether the question is asked about; others are kept as they are."""
        ...

    def values(self, question: Question) -> dict[str, object]:
        """What is filled into the prompt."""
        ...

    def judge(self, question: Question, reply: Any) -> Question:
        """The question after a reply, an object of ``reply_model``. ``Unusable`` where it is of no use."""
        ...


class Unusable(Exception):
    """A reply that is valid, but no use: a reason among few, and what is special about this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def messages_of(stage: LanguageStage, question: Question, folder: Path) -> tuple[Message, ...]:
    """What the stage asks about a question whose images are in ``folder``."""
    images = tuple(folder / image for image in question.images) if stage.settings.with_images else ()
    return stage.prompt.messages(stage.values(question), images)


def ask_all(
    stage: LanguageStage, questions: Iterable[Question], client: ChatClient, folder: Path, *, seed: int
) -> Iterator[Outcome]:
    """What the stage makes of each question, in their order; several are asked at once."""
    waiting: deque[tuple[Question, bool]] = deque()

    def requests() -> Iterator[ChatRequest]:
        for question in questions:
            is_asked = stage.asks(question)
            waiting.append((question, is_asked))
            if is_asked:
                yield ChatRequest(
                    messages=messages_of(stage, question, folder),
                    max_tokens=stage.settings.max_tokens,
                    temperature=stage.settings.temperature,
                    seed=seed if stage.settings.temperature > 0 else None,
                    schema=stage.reply_model,
                    schema_name=stage.name,
                )

    for reply in client.ask(requests()):
        while not waiting[0][1]:
            yield Kept(waiting.popleft()[0])
        yield _outcome(stage, waiting.popleft()[0], reply)
    while waiting:
        yield Kept(waiting.popleft()[0])


def _outcome(stage: LanguageStage, question: Question, reply: ChatReply) -> Outcome:
    if reply.error is not None and not reply.error_is_lasting:
        return Unanswered(question.id, reply.error)
    tokens = {"num_prompt_tokens": reply.num_prompt_tokens, "num_completion_tokens": reply.num_completion_tokens}
    if reply.error is not None:
        return Dropped(question.id, question.source, "no usable reply", reply.error, {"error": reply.error, **tokens})
    raw = {"reply": reply.texts[0], **tokens}
    try:
        judged = stage.judge(question, stage.reply_model.model_validate_json(reply.texts[0]))
    except Unusable as error:
        return Dropped(question.id, question.source, error.reason, error.detail, raw)
    return Kept(judged, raw)
