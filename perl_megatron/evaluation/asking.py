"""Who answers an evaluation's questions: a rollout engine, or a chat endpoint."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from perl_megatron.chat.messages import ChatRequest, Message
from perl_megatron.config.schema import Config
from perl_megatron.data.images import MAX_SOURCE_PIXELS, MERGED_PATCH, check_image, load_image
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.rollout.engine import RolloutEngine, Sampling
from perl_megatron.runtime.collective import gather_objects, together
from perl_megatron.runtime.rng import derive_seed
from perl_megatron.types import IMAGE_PLACEHOLDER, EncodedPrompt, View

if TYPE_CHECKING:  # as in reward/judge.py
    from perl_megatron.chat.client import ChatClient


@dataclass(frozen=True)
class Reply:
    """One answer to a view."""

    text: str
    finish_reason: str
    """'stop', 'length' (cut at the token limit), 'not asked' (the question cannot be), or 'error' (no answer came)."""
    problem: str | None = None
    """Why there is no answer."""


class Asker(Protocol):
    """Answers views. With an engine, every method is called by all ranks together."""

    name: str
    """For titles: 'embedded engine', 'endpoint qwen'."""

    def ask(self, views: Sequence[View], sampling: Sampling) -> list[list[Reply]]:
        """``sampling.num_rollouts`` replies to each view; a view that cannot be asked has as many that say why."""
        ...


def evaluation_sampling(config: Config) -> Sampling:
    """How an evaluation's answers are sampled."""
    evaluation = config.evaluation
    return Sampling(
        num_rollouts=evaluation.num_rollouts,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_tokens=evaluation.max_response_tokens or config.rollout.max_response_tokens,
    )


def view_seed(config: Config, view: View) -> int:
    """Names the random streams of a view's answers; greedy ones need none."""
    if config.evaluation.temperature == 0:
        return 0
    return derive_seed(config.run.seed, "evaluation answers", view.record_id, view.index)


class EngineAsker:
    """Asks a rollout engine.

    Args:
        config: seeds and bounds.
        encoder: of the policy that the engine runs.
        engine: what answers.
        checked: the views' records were checked when they were read: one that cannot be encoded is a ``UserError``.
    """

    def __init__(self, config: Config, encoder: PromptEncoder, engine: RolloutEngine, *, checked: bool):
        self._config, self._encoder, self._engine, self._checked = config, encoder, engine, checked
        self.name = f"{engine.name} engine"

    def ask(self, views: Sequence[View], sampling: Sampling) -> list[list[Reply]]:
        """Unchecked views with a broken image, a special token or too long a prompt are not asked."""
        prompts = self._prompts(views)
        asked = [(view, prompt) for view, prompt in zip(views, prompts, strict=True) if not isinstance(prompt, str)]
        seeds = [view_seed(self._config, view) for view, _ in asked]
        rollouts = iter(
            self._engine.generate([view for view, _ in asked], [prompt for _, prompt in asked], sampling, seeds=seeds)
            if asked
            else ()
        )
        replies = []
        for prompt in prompts:
            if isinstance(prompt, str):
                replies.append([Reply("", "not asked", prompt)] * sampling.num_rollouts)
            else:
                mine = [next(rollouts) for _ in range(sampling.num_rollouts)]
                replies.append([Reply(rollout.text, rollout.finish_reason) for rollout in mine])
        return replies

    def _prompts(self, views: Sequence[View]) -> list[EncodedPrompt | str]:
        """For each view its prompt, or why it cannot be asked; what one rank cannot encode, none asks."""
        if self._checked:
            return list(together(lambda: [self._encoder.encode(view) for view in views]))
        prompts = [self._prompt(view) for view in views]
        for problems in gather_objects([prompt if isinstance(prompt, str) else None for prompt in prompts]):
            prompts = [problem or prompt for prompt, problem in zip(prompts, problems, strict=True)]
        return prompts

    def _prompt(self, view: View) -> EncodedPrompt | str:
        """The encoded view, or why it cannot be asked."""
        try:
            prompt = self._encoder.encode(view)
        except UserError as error:
            return error.what
        longest = self._config.data.max_prompt_tokens
        if len(prompt.token_ids) > longest:
            return f"its prompt has {len(prompt.token_ids)} tokens, more than data.max_prompt_tokens = {longest}"
        return prompt


class EndpointAsker:
    """Asks an OpenAI-compatible endpoint, with the same system prompt; images go as files."""

    def __init__(self, config: Config, client: ChatClient):
        self._config, self._client = config, client
        self.name = f"endpoint {config.endpoint.model or config.endpoint.url}"

    def ask(self, views: Sequence[View], sampling: Sampling) -> list[list[Reply]]:
        """Views with a broken image are not asked; what the endpoint does not answer is an 'error'."""
        problems = [self._problem(view) for view in views]
        replies = self._client.ask(self._requests(views, problems, sampling))
        answers = []
        for problem in problems:
            if problem is not None:
                answers.append([Reply("", "not asked", problem)] * sampling.num_rollouts)
                continue
            reply = next(replies)
            if reply.error is not None:
                answers.append([Reply("", "error", reply.error)] * sampling.num_rollouts)
            else:
                answers.append([Reply(*pair) for pair in zip(reply.texts, reply.finish_reasons, strict=True)])
        return answers

    def _requests(
        self, views: Sequence[View], problems: Sequence[str | None], sampling: Sampling
    ) -> Iterator[ChatRequest]:
        """Made as they are needed, so that few images are in memory."""
        for view, problem in zip(views, problems, strict=True):
            if problem is None:
                yield ChatRequest(
                    self._messages(view),
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=view_seed(self._config, view) % 2**31 if sampling.temperature > 0 else None,
                    num_samples=sampling.num_rollouts,
                )

    def _messages(self, view: View) -> tuple[Message, ...]:
        parts: list[str | Path | bytes] = []
        for index, piece in enumerate(view.text.split(IMAGE_PLACEHOLDER)):
            if index > 0:
                parts.append(self._image(view.images[index - 1]))
            if piece:
                parts.append(piece)
        system = self._config.data.system_prompt
        return (*([Message("system", (system,))] if system else []), Message("user", tuple(parts)))

    def _image(self, path: Path) -> Path | bytes:
        """The file itself, or with `data.min_pixels` or `data.max_pixels` the image resized as for an engine."""
        data = self._config.data
        if data.min_pixels is None and data.max_pixels is None:
            return path
        image = load_image(path, data.min_pixels or MERGED_PATCH**2, data.max_pixels or MAX_SOURCE_PIXELS)
        content = io.BytesIO()
        image.save(content, "PNG")
        return content.getvalue()

    def _problem(self, view: View) -> str | None:
        if view.text.count(IMAGE_PLACEHOLDER) != len(view.images):
            return f"its text has {view.text.count(IMAGE_PLACEHOLDER)} placeholders for {len(view.images)} images"
        try:
            for path in view.images:
                check_image(path)
        except UserError as error:
            return f"{error.what} [{error.where}]"
        return None
