"""The reward of one response by rules: its parts, each between 0 and 1, and the weighted sum (PeRL: 0.9 and 0.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from perl_megatron.config.reward_section import RewardConfig, parse_function, part_name
from perl_megatron.errors import UserError
from perl_megatron.reward.boxed import follows_format, last_boxed
from perl_megatron.reward.grade import answers, final_answer, question_of, read_answer
from perl_megatron.reward.math_equivalence import math_equal
from perl_megatron.types import View


def score_accuracy(text: str, view: View, *, maths: Callable[[str, str], bool] = math_equal) -> float:
    r"""1 if the last ``\boxed{…}`` of the response equals the view's own answer (PeRL Eq. 4), else 0.

    A response that was cut after its box is graded all the same. ``maths`` decides whether two mathematical
    expressions, (expected, given), are equal.
    """
    given = final_answer(text, view.answer_type)
    return 0.0 if given is None else float(answers(given, question_of(view), maths=maths))


def score_format(text: str, finish_reason: str, style: str) -> float:
    r"""1 if the response has the form of ``reward.format_style`` and ended by itself, else 0.

    'think_boxed' is ``<think>…</think> … \boxed{…} …``, 'boxed' any text with a box. Stricter than the released code in
    one point: a response cut at the token limit does not have the format.
    """
    has_form = follows_format(text) if style == "think_boxed" else last_boxed(text) is not None
    return float(finish_reason == "stop" and has_form)


def score(
    text: str,
    view: View,
    finish_reason: str,
    config: RewardConfig,
    *,
    maths: Callable[[str, str], bool] = math_equal,
) -> dict[str, float]:
    """The parts that rules decide, 'accuracy' and 'format', also where their weight is 0.

    For many responses see ``scorer.rule_parts``, for the other parts ``scorer.Scorer``. ``maths`` is
    ``score_accuracy``'s.

    Raises:
        UserError: the record's answer cannot be read as its answer type.
    """
    return {
        "accuracy": score_accuracy(text, view, maths=maths),
        "format": score_format(text, finish_reason, config.format_style),
    }


def readable(text: str, view: View) -> bool:
    """Whether a response holds an answer of the view's type, right or wrong.

    Not where there is no box, or where its content cannot be read as such an answer: 'A or B' as a choice, 'many' as a
    number. Cheap: a mathematical expression counts as readable if it is short and flat enough to be compared.
    """
    given = final_answer(text, view.answer_type)
    return given is not None and read_answer(given, question_of(view)) is not None


def total(parts: Mapping[str, float], config: RewardConfig) -> float:
    """Σ weight · part, rounded once: the weights count as the decimals that the config shows.

    So two rewards are equal floats exactly when their sums are equal: 0.1 + 0.2 and 0.3 are the same reward.

    Raises:
        UserError: a part is NaN or infinite.
    """
    for name, part in parts.items():
        if not math.isfinite(part):
            raise UserError(f"the reward part {name!r} is {part}", fix="mend the reward function")
    weight_of = weights(config)
    return float(sum(Fraction(str(weight_of[name])) * Fraction(str(part)) for name, part in parts.items()))


def weights(config: RewardConfig) -> dict[str, float]:
    """Weight of every part, by the name under which it is recorded."""
    names = ("accuracy", "format", "judge", "consistency", "overlong")
    own = {name: getattr(config, name) for name in names}
    return own | {part_name(target): weight for target, weight in map(parse_function, config.functions)}
