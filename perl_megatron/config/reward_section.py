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

    # Parts that the whole group, or the length of a response, decides
    consistency: float = Field(default=0.0, ge=0)
    """Weight of being right together: the share of paired responses, to the question in another image order, that are
    right where this one is (ConsistRoll)."""
    overlong: float = Field(default=0.0, ge=0)
    """Weight of the penalty, down to -1, for a response that comes close to rollout.max_response_tokens (DAPO)."""
    overlong_buffer: int = Field(default=512, ge=1)
    """Tokens before rollout.max_response_tokens over which that penalty rises."""
