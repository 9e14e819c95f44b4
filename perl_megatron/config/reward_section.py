"""The section of the reward: what a response earns."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from perl_megatron.config.section import Section, as_texts

_FUNCTION = re.compile(r"\s*(?P<target>[\w.-]+(?::[\w.]+)?)\s*=\s*(?P<weight>[^=\s]+)\s*")
AnswerType = Literal["choice", "index", "json", "math", "number", "ordering", "short_text", "text"]
"""How an answer is graded (`answer_type` of a record)."""
_OWN_PARTS = ("accuracy", "format", "judge", "consistency", "overlong")


def _check_functions(functions: tuple[str, ...]) -> tuple[str, ...]:
    names = list(_OWN_PARTS)
    for text in functions:
        target, _ = parse_function(text)
        name = part_name(target)
        if name in names:
            raise ValueError(f"there is already a reward part {name!r}")
        names.append(name)
    return functions


def parse_function(text: str) -> tuple[str, float]:
    """The name or path, and the weight, of an entry of `reward.functions`. ValueError if it is not one."""
    match = _FUNCTION.fullmatch(text)
    try:
        weight = float(match["weight"]) if match else math.nan
    except ValueError:
        weight = math.nan
    if match is None or not math.isfinite(weight):
        raise ValueError(f"{text!r} is not NAME=WEIGHT or MODULE:FUNCTION=WEIGHT")
    return match["target"], weight


def part_name(target: str) -> str:
    """What the part of a function is called: the name of the entry point, or of the function itself."""
    return target.rpartition(":")[2].rpartition(".")[2] if ":" in target else target


class RewardConfig(Section):
    """Weights of the reward's parts, and how they are decided."""

    accuracy: float = Field(default=0.9, ge=0)
    """Weight of a right answer."""
    format: float = Field(default=0.1, ge=0)
    """Weight of the format (reward.format_style)."""
    format_style: Literal["think_boxed", "boxed"] = "think_boxed"
    """What a response has to look like: `<think>…</think> … \\boxed{…}` as in the paper, or just `\\boxed{…}`."""
    judge: float = Field(default=0.0, ge=0)
    """Weight of what a language model says of the answer (section `judge`); at 0 it is not asked."""
    judge_types: Annotated[tuple[AnswerType, ...], BeforeValidator(as_texts)] = ("short_text", "text")
    """Answer types whose answers the judge is asked about, where the rules do not hold them for right; all other
    answers get their accuracy as the judge's part."""
    judge_failure: Literal["error", "zero"] = "error"
    """What happens where the judge gives no verdict, after all retries: the run ends, or the part is 0, with a
    warning."""
    functions: Annotated[tuple[str, ...], BeforeValidator(as_texts), AfterValidator(_check_functions)] = ()
    """Reward functions of your own with their weights, as `NAME=0.2` (an entry point of the group
    `perl_megatron.rewards`) or `package.module:function=0.2`."""

    # Parts that the whole group, or the length of a response, decides
    consistency: float = Field(default=0.0, ge=0)
    """Weight of being right together: the share of paired responses, to the question in another image order, that are
    right where this one is (ConsistRoll)."""
    overlong: float = Field(default=0.0, ge=0)
    """Weight of the penalty, down to -1, for a response that comes close to rollout.max_response_tokens (DAPO)."""
    overlong_buffer: int = Field(default=512, ge=1)
    """Tokens before rollout.max_response_tokens over which that penalty rises."""
