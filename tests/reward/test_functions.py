"""Reward functions of a user's own: found, checked, called, and named in errors."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from perl_megatron.config.reward_section import RewardConfig
from perl_megatron.errors import UserError
from perl_megatron.reward import functions
from perl_megatron.reward.functions import GROUP, load_functions
from perl_megatron.types import View

VIEW = View("q7", 0, (), (), "How many?", "3", "number")
MODULE = """
import numpy
calls = []

def share_of_answer(text, view, finish_reason):
    calls.append((text, view.answer, finish_reason))
    return numpy.float32(len(view.answer) / len(text))

def true(text, view, finish_reason): return True
def nan(text, view, finish_reason): return float("nan")
def nothing(text, view, finish_reason): return None
def word(text, view, finish_reason): return "1"
def fails(text, view, finish_reason): raise KeyError("colour")
def of_text(text): return 1.0

class Rewards:
    @staticmethod
    def constant(text, view, finish_reason, extra=0): return 0.25
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no model')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("users_rewards", "broken_rewards"):
        sys.modules.pop(name, None)


def load(*texts: str) -> tuple[functions.RewardFunction, ...]:
    return load_functions(RewardConfig(functions=texts))


def test_by_path():
    share, constant = load("users_rewards:share_of_answer=0.2", "users_rewards:Rewards.constant=1")
    assert [share.name, constant.name] == ["share_of_answer", "constant"]
    assert share("abcd", VIEW, "length") == 0.25
    assert isinstance(share("abcd", VIEW, "stop"), float)
    assert sys.modules["users_rewards"].calls == [("abcd", "3", "length"), ("abcd", "3", "stop")]
    assert constant("", VIEW, "stop") == 0.25
    assert load("users_rewards:true=1")[0]("", VIEW, "stop") == 1.0


def test_by_entry_point(monkeypatch: pytest.MonkeyPatch):
    offered = [
        EntryPoint("constant", "users_rewards:Rewards.constant", GROUP),
        EntryPoint("x", "users_rewards:nan", GROUP),
    ]
    monkeypatch.setattr(functions, "entry_points", lambda group: offered if group == GROUP else [])
    (function,) = load("constant=0.5")
    assert function("", VIEW, "stop") == 0.25
    with pytest.raises(UserError, match="did you mean 'constant'"):
        load("constat=1")
    offered.append(EntryPoint("constant", "users_rewards:true", GROUP))
    with pytest.raises(UserError, match="several packages offer it"):
        load("constant=1")


def test_installed_entry_points_are_looked_up():
    with pytest.raises(UserError, match=r"no installed package offers it in the group 'perl_megatron\.rewards'"):
        load("nobody_has_this=1")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:f", "No module named"),
        ("users_rewards:missing", "has no attribute 'missing'"),
        ("broken_rewards:f", "RuntimeError: no model"),
        ("users_rewards:of_text", r"does not take \(text, view, finish_reason\)"),
        ("users_rewards:calls", r"does not take \(text, view, finish_reason\)"),
    ],
)
def test_what_cannot_be_loaded_is_named(target, message):
    with pytest.raises(UserError, match=message) as error:
        load(f"{target}=1")
    assert target in str(error.value.where)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "'users_rewards:nan' gave nan"),
        ("nothing", "'users_rewards:nothing' gave None"),
        ("word", "'users_rewards:word' gave '1'"),
        ("fails", "'users_rewards:fails' raised KeyError: 'colour'"),
    ],
)
def test_a_failure_names_function_and_record(name, message):
    (function,) = load(f"users_rewards:{name}=1")
    with pytest.raises(UserError, match=message) as error:
        function("text", VIEW, "stop")
    assert error.value.where == "record q7"


def test_numpy_is_a_number_too():
    function = functions.RewardFunction("f", "m:f", lambda *_: np.float64(0.5))
    assert function("", VIEW, "stop") == 0.5
