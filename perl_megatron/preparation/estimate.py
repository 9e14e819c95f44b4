"""What the stages would ask, and how many tokens that takes; nothing is asked and nothing is written.

Stages that are done are read from their files. For the others the estimate is an upper bound: everything that comes in
is taken to be kept, open questions are counted as they are, and replies as long as they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from perl_megatron.chat.messages import Message
from perl_megatron.data.images import MERGED_PATCH, smart_resize
from perl_megatron.errors import UserError
from perl_megatron.preparation.language_stage import LanguageStage, messages_of
from perl_megatron.preparation.manifest import Manifest
from perl_megatron.preparation.pipeline import STAGES, Pipeline
from perl_megatron.preparation.question import Kept, Question
from perl_megatron.preparation.rules import apply_rules
from perl_megatron.types import IMAGE_PLACEHOLDER

CHARACTERS_PER_TOKEN = 4.0
"""Of English text with the vocabularies in use, about; a tokenizer counts exactly."""
MESSAGE_TOKENS = 5
"""What a chat template puts around a message, about."""
IMAGE_BOUNDS = 3136, 1003520
"""Pixels: what Qwen2.5-VL's cookbook uses for images; what an endpoint does with images is its own business."""

CountTokens = Callable[[str], int]


def count_by_characters(text: str) -> int:
    """A token for every four characters."""
    return round(len(text) / CHARACTERS_PER_TOKEN)


@dataclass
class StageCost:
    """What a stage would ask."""

    stage: str
    num_requests: int = 0
    num_replies: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    reply_tokens: int = 0
    """At most: all replies as long as they may be."""
    is_done: bool = False
    """Whether the stage is finished: then it asks nothing more."""


def estimate(
    pipeline: Pipeline, *, num_shown: int, count_tokens: CountTokens, show: Callable[[str, str, str], None]
) -> list[StageCost]:
    """The cost of each stage that asks somebody.

    Args:
        num_shown: so many prompts of each stage are given to ``show``, as (stage, question id, prompt).
        count_tokens: tokens of a text.
    """
    settings = pipeline.settings
    costs = []
    for name in ("rephrase", "difficulty", "label"):
        cost = StageCost(name, is_done=_is_done(pipeline, name))
        costs.append(cost)
        if cost.is_done:
            continue
        for question in _incoming(pipeline, name):
            if name == "difficulty":
                _add_difficulty(cost, pipeline, question, count_tokens)
                text = f"{settings.difficulty.system_prompt}\n\n{question.full_text()}"
            else:
                stage: LanguageStage = pipeline.rephrase if name == "rephrase" else pipeline.label
                if not stage.asks(question):
                    continue
                messages = messages_of(stage, question, pipeline.folder)
                _add_language(cost, stage, question, messages, count_tokens)
                text = "\n\n".join(_shown(message) for message in messages)
            if cost.num_requests <= num_shown:
                show(name, question.id, text)
    size = settings.resample.size
    if size is not None and not _is_done(pipeline, "resample") and size < costs[-1].num_requests:
        _scale(costs[-1], size)
    return costs


def image_tokens(sizes: tuple[tuple[int, int], ...], *, min_pixels: int, max_pixels: int) -> int:
    """Tokens of images of (width, height) in Qwen2.5-VL: one for every 28 × 28 pixels after its resizing, and two
    around each image."""
    total = 0
    for width, height in sizes:
        try:
            new_height, new_width = smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
        except UserError:
            continue  # it will be dropped
        total += new_height * new_width // MERGED_PATCH**2 + 2
    return total


def _is_done(pipeline: Pipeline, name: str) -> bool:
    return pipeline.folder.is_dir() and Manifest(pipeline.folder).is_finished(name, pipeline.marks()[name])


def _incoming(pipeline: Pipeline, name: str) -> Iterator[Question]:
    """The questions that come into a stage: those of the nearest stage before it that is finished."""
    for before in reversed(STAGES[: STAGES.index(name)]):
        if _is_done(pipeline, before):
            yield from pipeline.files[before].questions()
            return
    for outcome in apply_rules(pipeline.settings.source, pipeline.settings.rules, None, ()):
        if isinstance(outcome, Kept):
            yield outcome.question


def _add_language(
    cost: StageCost, stage: LanguageStage, question: Question, messages: tuple[Message, ...], count: CountTokens
) -> None:
    cost.num_requests += 1
    cost.num_replies += 1
    cost.text_tokens += sum(count(_shown(message)) + MESSAGE_TOKENS for message in messages)
    cost.reply_tokens += stage.settings.max_tokens
    if stage.settings.with_images:
        least, most = IMAGE_BOUNDS
        cost.image_tokens += image_tokens(question.image_sizes, min_pixels=least, max_pixels=most)


def _add_difficulty(cost: StageCost, pipeline: Pipeline, question: Question, count: CountTokens) -> None:
    settings = pipeline.settings.difficulty
    cost.num_requests += 1
    cost.num_replies += settings.num_rollouts
    text = question.full_text().replace(IMAGE_PLACEHOLDER, "")
    cost.text_tokens += count(settings.system_prompt) + count(text) + 2 * MESSAGE_TOKENS
    cost.reply_tokens += settings.num_rollouts * settings.max_response_tokens
    cost.image_tokens += image_tokens(
        question.image_sizes, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
    )


def _shown(message: Message) -> str:
    return "".join(part if isinstance(part, str) else "<image>" for part in message.parts)


def _scale(cost: StageCost, size: int) -> None:
    """After resampling there are so many questions: the estimate of all, in proportion."""
    for field in ("num_replies", "text_tokens", "image_tokens", "reply_tokens"):
        setattr(cost, field, round(getattr(cost, field) * size / cost.num_requests))
    cost.num_requests = size
