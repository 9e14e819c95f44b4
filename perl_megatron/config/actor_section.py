"""The section of the actor: what of a group it computes once, and how much of it at a time."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perl_megatron.config.section import Section


class ActorSection(Section):
    """How a group's sequences are laid out for the policy; nothing of it changes a log-probability or a gradient."""

    sharing: Literal["full", "vision", "none"] = "full"
    """What is computed once: 'full' each distinct image of a micro-batch and each prompt, which all responses to it
    share; 'vision' the images only; 'none' neither, which is slow and the reference of the others."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Upper bound of a micro-batch on each data-parallel rank, in tokens of the language model (a prompt counts once
    where it is shared; image patches count by the size of their activations). A view that exceeds it is split by its
    responses, and a single response that exceeds it is a micro-batch by itself."""
