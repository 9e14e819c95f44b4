"""The third stage: how often a policy answers each question right, out of n sampled responses.

Responses are sampled and graded as in training: the same prompt, a box for the answer. They are kept, all of them.
"""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from perl_megatron.chat.client import ChatClient
from perl_megatron.chat.messages import ChatRequest, Message
from perl_megatron.config.reward_section import RewardConfig
from perl_megatron.data.images import load_image
from perl_megatron.data.permutation import apply_order
from perl_megatron.errors import UserError
from perl_megatron.preparation.question import Dropped, Kept, Outcome, Question, Unanswered
from perl_megatron.preparation.settings import DifficultySettings
from perl_megatron.reward.grade import check_expected
from perl_megatron.reward.score import score
from perl_megatron.types import IMAGE_PLACEHOLDER, View


@dataclass(frozen=True)
class Responses:
    """What a policy said to one question."""

    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]


class Policy(Protocol):
    """Answers questions."""

    def respond(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Responses | Dropped | Unanswered]]:
        """``num_rollouts`` responses to each question, in their order; or why there are none."""
        ...


def measure(questions: Iterable[Question], policy: Policy, folder: Path) -> Iterator[Outcome]:
    """Each question with its accuracy, in their order."""
    for question, answered in policy.respond(questions):
        if not isinstance(answered, Responses):
            yield answered
            continue
        view = view_of(question, folder)
        try:
            check_expected(
                view.answer,
                view.answer_type,
                where=question.id,
                grading=view.grading,
                option_slots=view.option_slots,
                num_images=len(view.images),
            )
        except UserError as error:
            yield Dropped(question.id, question.source, "the answer cannot be graded", error.what)
            continue
        right = [
            score(text, view, reason, RewardConfig())["accuracy"] == 1
            for text, reason in zip(answered.texts, answered.finish_reasons, strict=True)
        ]
        responses = [
            {"text": text, "finish_reason": reason, "right": is_right}
            for text, reason, is_right in zip(answered.texts, answered.finish_reasons, right, strict=True)
        ]
        yield Kept(replace(question, accuracy=sum(right) / len(right)), {"responses": responses})


def view_of(question: Question, folder: Path) -> View:
    """The question in its own order."""
    return apply_order(question.record(folder), range(len(question.images)), 0)


def question_seed(seed: int, identifier: str) -> int:
    """A seed of 31 bits for everything that is sampled for a question; the run's seed and the question decide it."""
    digest = hashlib.blake2b(f"{seed}:{identifier}".encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class EndpointPolicy:
    """A policy behind an OpenAI-compatible endpoint. Images are resized here, so that its bounds hold for any."""

    def __init__(self, client: ChatClient, settings: DifficultySettings, folder: Path, *, seed: int):
        self._client, self._settings, self._folder, self._seed = client, settings, folder, seed

    def respond(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Responses | Dropped | Unanswered]]:
        """See ``Policy``."""
        waiting: deque[Question] = deque()

        def requests() -> Iterator[ChatRequest]:
            for question in questions:
                waiting.append(question)
                yield self._request(question)

        for reply in self._client.ask(requests()):
            question = waiting.popleft()
            if reply.error is None:
                yield question, Responses(reply.texts, reply.finish_reasons)
            elif reply.error_is_lasting:
                yield question, Dropped(question.id, question.source, "the policy cannot answer", reply.error)
            else:
                yield question, Unanswered(question.id, reply.error)

    def _request(self, question: Question) -> ChatRequest:
        settings = self._settings
        system = (Message("system", (settings.system_prompt,)),) if settings.system_prompt else ()
        return ChatRequest(
            messages=(*system, Message("user", tuple(self._parts(question)))),
            max_tokens=settings.max_response_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=question_seed(self._seed, question.id),
            num_samples=settings.num_rollouts,
        )

    def _parts(self, question: Question) -> Iterator[str | bytes]:
        """Texts and images in place."""
        for number, piece in enumerate(question.full_text().split(IMAGE_PLACEHOLDER)):
            if number > 0:
                path = self._folder / question.images[number - 1]
                image = load_image(path, self._settings.min_pixels, self._settings.max_pixels)
                content = io.BytesIO()
                image.save(content, "PNG", compress_level=1)
                yield content.getvalue()
            if piece:
                yield piece
