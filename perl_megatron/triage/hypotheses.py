"""What may have gone wrong: with token ids, pixels and mRoPE positions (inputs of their own), and with the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from perl_megatron.data.processor import PromptEncoder
from perl_megatron.triage.cases import Change
from perl_megatron.triage.image_changes import order_changes, pixel_changes
from perl_megatron.triage.policies import Mix, Policy, stale_mixes
from perl_megatron.triage.position_changes import position_changes
from perl_megatron.triage.token_changes import token_changes
from perl_megatron.triage.verdicts import Cause


@dataclass(frozen=True)
class Hypothesis:
    """One thing that may have gone wrong."""

    cause: Cause | None
    name: str
    change: Change | None = None
    """What becomes of the right input; None: it stays."""
    mix: Mix | None = None
    """The weights; None: those that were expected."""


RIGHT = Hypothesis(None, "nothing is wrong")


def hypotheses(
    encoder: PromptEncoder, max_images: int, *, expected: Policy, others: Sequence[Policy], dtype: torch.dtype
) -> Iterator[Hypothesis]:
    """All of them, for rollouts of at most ``max_images`` images.

    The weights are read when it comes to them: each of ``others``, whole and by parts, where its numbers, as ``dtype``,
    are not those of ``expected``.
    """
    for cause, changes in (
        (Cause.TOKEN_IDS, token_changes(encoder)),
        (Cause.PIXELS, order_changes(max_images)),
        (Cause.PIXELS, pixel_changes(encoder)),
        (Cause.POSITIONS, position_changes()),
    ):
        for name, change in changes:
            yield Hypothesis(cause, name, change)
    for other in others:
        for name, mix in stale_mixes(expected, other, dtype).items():
            yield Hypothesis(Cause.WEIGHTS, name, mix=mix)
