"""Reward functions of a user's own, found by entry point or by path.

A function takes what a response is judged by, and gives a number:

    def brevity(text: str, view: View, finish_reason: str) -> float

``text`` is the response, ``view`` the question in its image order with its own answer (``perl_megatron.types.View``),
``finish_reason`` 'stop' or 'length'. The number should lie between 0 and 1 and has to be finite. Functions run in the
trainer's own processes, one response at a time: they may hold models or caches, and nothing but their authors bounds
their time.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

from perl_megatron.config.reward_section import RewardConfig, parse_function, part_name
from perl_megatron.errors import UserError
from perl_megatron.types import View

GROUP = "perl_megatron.rewards"
"""Of the entry points in packages' metadata."""


@dataclass(frozen=True)
class RewardFunction:
    """A reward part that a user's function decides."""

    name: str
    """Under which the part is recorded."""
    target: str
    """As the config names it."""
    function: Callable[[str, View, str], object]

    def __call__(self, text: str, view: View, finish_reason: str) -> float:
        """The part of one response.

        Raises:
            UserError: the function raises, or gives anything but a finite number; names function and record.
        """
        try:
            value = self.function(text, view, finish_reason)
        except Exception as error:
            what = f"the reward function {self.target!r} raised {type(error).__name__}: {error}"
            raise UserError(what, where=f"record {view.record_id}", fix="mend the function") from error
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"the reward function {self.target!r} gave {value!r:.100}, not a finite number",
                where=f"record {view.record_id}",
                fix="let it return a float, best between 0 and 1",
            )
        return number


def load_functions(config: RewardConfig) -> tuple[RewardFunction, ...]:
    """The functions of `reward.functions`, in its order.

    Raises:
        UserError: one is not found, cannot be imported, or does not take three arguments.
    """
    return tuple(_load(parse_function(text)[0]) for text in config.functions)


def _load(target: str) -> RewardFunction:
    where = f"reward.functions: {target}"
    try:
        function = _by_path(target) if ":" in target else _by_entry_point(target)
    except UserError:
        raise
    except Exception as error:  # a module may raise anything while it is imported
        raise UserError(
            f"the reward function cannot be loaded: {type(error).__name__}: {error}",
            where=where,
            fix="check the name, and that its package is installed, or its folder in PYTHONPATH, where the run starts",
        ) from error
    try:
        inspect.signature(function).bind("text", None, "stop")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the reward function does not take (text, view, finish_reason): {error}",
            where=where,
            fix="see docs/rewards.md for its signature",
        ) from error
    return RewardFunction(part_name(target), target, function)


def _by_path(target: str) -> Callable[[str, View, str], object]:
    module, _, names = target.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found  # type: ignore[return-value]


def _by_entry_point(name: str) -> Callable[[str, View, str], object]:
    found = entry_points(group=GROUP)
    chosen = {entry.value: entry for entry in found if entry.name == name}
    if len(chosen) == 1:
        function: Callable[[str, View, str], object] = next(iter(chosen.values())).load()
        return function
    if chosen:
        problem, fix = f"several packages offer it: {sorted(chosen)}", "name one of these paths instead"
    else:
        near = difflib.get_close_matches(name, [entry.name for entry in found], n=1)
        problem = f"no installed package offers it in the group {GROUP!r}"
        fix = f"did you mean {near[0]!r}?" if near else "install its package, or write package.module:function"
    raise UserError(f"the reward function {name!r} is not there: {problem}", where="reward.functions", fix=fix)
