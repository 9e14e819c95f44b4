"""The reward of one response: its parts, each between 0 and 1, and their weighted sum (PeRL: 0.9 and 0.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from perl_megatron.config.schema import RewardConfig
from perl_megatron.errors import UserError
from perl_megatron.reward.boxed import follows_format, last_boxed
from perl_megatron.reward.grade import is_right
from perl_megatron.types import View


def score_accuracy(text: str, view: View, finish_reason: str) -> float:
    r"""1 if the last ``\boxed{…}`` of the response equals the view's own answer (PeRL Eq. 4), else 0.

    A response that was cut after its box is graded all the same: ``finish_reason`` does not matter here.
    """
    boxed = last_boxed(text)
    if boxed is None:
        return 0.0
    return float(is_right(boxed, view.answer, view.answer_type, where=f"record {view.record_id}"))


def score_format(text: str, view: View, finish_reason: str) -> float:
    r"""1 if the response is ``<think>…</think> … \boxed{…} …`` and ended by itself, else 0.

    Stricter than the released code in one point: a response cut at the token limit does not have the format.
    """
    return float(finish_reason == "stop" and follows_format(text))


PARTS = {"accuracy": score_accuracy, "format": score_format}
"""One function for each weight of ``RewardConfig``, under the same name (``algorithm/shaping.py`` has the others)."""


def score(text: str, view: View, finish_reason: str, config: RewardConfig) -> dict[str, float]:
    """All parts of one response's reward, those of weight 0 too.

    Raises:
        UserError: the record's answer cannot be read as its answer type.
    """
    return {name: part(text, view, finish_reason) for name, part in PARTS.items()}


def total(parts: Mapping[str, float], config: RewardConfig) -> float:
    """Σ weight · part, rounded once: the weights count as the decimals that the config shows.

    So two rewards are equal floats exactly when their sums are equal: 0.1 + 0.2 and 0.3 are the same reward.

    Raises:
        UserError: a part is NaN or infinite.
    """
    for name, part in parts.items():
        if not math.isfinite(part):
            raise UserError(f"the reward part {name!r} is {part}", fix="mend the reward function")
    return float(sum(Fraction(str(getattr(config, name))) * Fraction(str(part)) for name, part in parts.items()))
