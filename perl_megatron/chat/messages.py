"""What is asked of a chat endpoint, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """'system', 'user' or 'assistant'."""
    parts: tuple[str | Path | bytes, ...]
    """In order: texts, and images as paths or as the bytes of a PNG, JPEG, GIF or WebP file."""


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to be continued, and how."""

    messages: tuple[Message, ...]
    max_tokens: int
    """Replies are cut at this length."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling threshold."""
    seed: int | None = None
    """Seed of the endpoint's sampling, where it has one. A sampled reply (temperature above 0) is cached under its
    seed, and without a seed not at all."""
    num_samples: int = 1
    """Replies to the same conversation."""
    schema: Mapping[str, Any] | type[BaseModel] | None = None
    """What each reply has to be: a JSON document of this schema. Against a pydantic model it is checked in full; of a
    bare JSON schema only that it is JSON, and where the schema says so, an object with the required keys."""
    schema_name: str = "reply"
    """The schema's name, which some endpoints show to the model: letters, digits, '_' and '-'."""


@dataclass(frozen=True)
class ChatReply:
    """What an endpoint said to one request."""

    texts: tuple[str, ...]
    """``num_samples`` of them; with a schema, each is a JSON document. Empty where there is an error."""
    finish_reasons: tuple[str, ...]
    """For each text: 'stop', 'length' (cut at ``max_tokens``), or what else the endpoint calls it."""
    num_prompt_tokens: int
    """Prompt tokens of all tries that were answered, as the endpoint counts them (0 where it does not)."""
    num_completion_tokens: int
    """The same for the tokens of the replies."""
    cached: bool
    """Whether nothing was asked, because the reply was known."""
    error: str | None
    """Why there is no reply, after all retries; None where there is one."""
    error_is_lasting: bool = False
    """Whether the error is about the request itself, so that asking again is no use: the endpoint refuses it, or the
    replies were no valid JSON. Otherwise the endpoint was not well."""
