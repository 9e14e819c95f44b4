"""A policy in an engine of this project: embedded, vLLM, or servers of `perl-megatron serve`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.preparation.difficulty import Responses, question_seed, view_of
from perl_megatron.preparation.question import Dropped, Question, Unanswered
from perl_megatron.preparation.settings import DifficultySettings
from perl_megatron.rollout.engine import RolloutEngine, Sampling
from perl_megatron.types import EncodedPrompt, View


class EnginePolicy:
    """Asks an engine for ``difficulty.questions_at_once`` questions at a time.

    Args:
        max_prompt_tokens: questions with a longer prompt are dropped, as training would drop them.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        settings: DifficultySettings,
        folder: Path,
        *,
        max_prompt_tokens: int,
        seed: int,
    ):
        self._engine, self._encoder, self._settings, self._folder = engine, encoder, settings, folder
        self._max_prompt_tokens, self._seed = max_prompt_tokens, seed
        self._sampling = Sampling(
            num_rollouts=settings.num_rollouts,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_response_tokens,
        )

    def respond(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Responses | Dropped | Unanswered]]:
        """See ``Policy``."""
        remaining = iter(questions)
        while batch := list(itertools.islice(remaining, self._settings.questions_at_once)):
            yield from self._respond(batch)

    def _respond(self, batch: list[Question]) -> Iterator[tuple[Question, Responses | Dropped | Unanswered]]:
        encoded = [self._encoded(question) for question in batch]
        asked = [pair for pair in encoded if not isinstance(pair, Dropped)]
        seeds = [question_seed(self._seed, view.record_id) for view, _ in asked]
        views, prompts = [view for view, _ in asked], [prompt for _, prompt in asked]
        rollouts = self._engine.generate(views, prompts, self._sampling, seeds=seeds) if asked else []
        remaining = iter(rollouts)
        for question, pair in zip(batch, encoded, strict=True):
            if isinstance(pair, Dropped):
                yield question, pair
            else:
                mine = itertools.islice(remaining, self._settings.num_rollouts)
                texts, reasons = zip(*((rollout.text, rollout.finish_reason) for rollout in mine), strict=True)
                yield question, Responses(texts, reasons)

    def _encoded(self, question: Question) -> tuple[View, EncodedPrompt] | Dropped:
        view = view_of(question, self._folder)
        try:
            prompt = self._encoder.encode(view)
        except UserError as error:
            return Dropped(question.id, question.source, "the policy cannot answer", error.what)
        if len(prompt.token_ids) > self._max_prompt_tokens:
            detail = f"{len(prompt.token_ids)} tokens"
            reason = f"the prompt has more than {self._max_prompt_tokens} tokens"
            return Dropped(question.id, question.source, reason, detail)
        return view, prompt
