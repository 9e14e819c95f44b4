"""The section of the chat endpoint: a language model that judges answers, labels records, or is evaluated."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from perl_megatron.config.section import Section


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint: `perl-megatron serve`, vLLM, or a hosted API."""

    url: str = ""
    """Base address of the endpoint, such as http://127.0.0.1:8000/v1; '' where there is none."""
    model: str = ""
    """The model that is asked; '' stands for the only one that the endpoint lists."""
    api_key_file: Path | None = None
    """File whose first line is the endpoint's key; without one no key is sent, whatever the environment holds."""
    deadline: float = Field(default=600.0, gt=0)
    """Seconds in which the endpoint has to answer one try of a request."""
    retries: int = Field(default=4, ge=0)
    """How often a request is tried again after a failure that may pass, with growing pauses between the tries."""
    concurrency: int = Field(default=16, ge=1)
    """Requests that are under way at once."""
    cache: Path | None = None
    """Folder of cached replies, which several processes may share: what it holds is not asked again."""
