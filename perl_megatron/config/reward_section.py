"""The section of the reward: what a response earns."""

from __future__ import annotations

from pydantic import Field

from perl_megatron.config.section import Section


class RewardConfig(Section):
    """Weights of the reward's parts."""

    accuracy: float = Field(default=0.9, ge=0)
    """Weight of a right answer."""
    format: float = Field(default=0.1, ge=0)
    """Weight of the format `<think>…</think> … \\boxed{…}`."""
