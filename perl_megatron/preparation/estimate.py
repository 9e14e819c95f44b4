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

ASKING = ("rephrase", "difficulty", "label")
"""The stages that ask somebody."""

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
    costs = {name: StageCost(name, is_done=_is_done(pipeline, name)) for name in ASKING}
    shown: dict[str, list[tuple[str, str]]] = {name: [] for name in ASKING}
    sources: dict[str | None, list[str]] = {}
    for name in ASKING:
        if not costs[name].is_done:
            sources.setdefault(_last_finished(pipeline, name), []).append(name)
    for source, stages in sources.items():  # the tables are read once for all stages
        for question in _questions(pipeline, source):
            for name in stages:
                text = _add(costs[name], pipeline, question, count_tokens)
                if text is not None and len(shown[name]) < num_shown:
                    shown[name].append((question.id, text))
    for name in ASKING:
        for identifier, text in shown[name]:
            show(name, identifier, text)
    size, label = pipeline.settings.resample.size, costs["label"]
    if size is not None and not _is_done(pipeline, "resample") and size < label.num_requests:
        _scale(label, size)
    return list(costs.values())


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


def _last_finished(pipeline: Pipeline, name: str) -> str | None:
    """The nearest stage before this one that is finished; None if none is."""
    before = reversed(STAGES[: STAGES.index(name)])
    return next((stage for stage in before if _is_done(pipeline, stage)), None)


def _questions(pipeline: Pipeline, source: str | None) -> Iterator[Question]:
    """Those that a stage keeps, or of the source those that the rules would keep."""
    if source is not None:
        yield from pipeline.files[source].questions()
        return
    for outcome in apply_rules(pipeline.settings.source, pipeline.settings.rules, None, ()):
        if isinstance(outcome, Kept):
            yield outcome.question


def _add(cost: StageCost, pipeline: Pipeline, question: Question, count: CountTokens) -> str | None:
    """Count a question; what would be asked about it, or None where nothing would."""
    if cost.stage == "difficulty":
        _add_difficulty(cost, pipeline, question, count)
        return f"{pipeline.settings.difficulty.system_prompt}\n\n{question.full_text()}"
    stage: LanguageStage = pipeline.rephrase if cost.stage == "rephrase" else pipeline.label
    if not stage.asks(question):
        return None
    messages = messages_of(stage, question, pipeline.folder)
    _add_language(cost, stage, question, messages, count)
    return "\n\n".join(_shown(message) for message in messages)


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
