"""Many responses at once: parts, who is asked what, and equality with scoring one by one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from scripted_endpoint import Said, ScriptedEndpoint, asked_text

from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.reward import math_equivalence
from perl_megatron.reward.score import readable, score, total
from perl_megatron.reward.scorer import Response, Scorer
from perl_megatron.types import Grading, View


def config(**sections: object) -> Config:
    return Config.model_validate({"model": {"path": Path("unused")}, **sections})


def response(given: str, answer: str, answer_type: str, finish_reason: str = "stop", **settings: object) -> Response:
    view = View("q", 0, (), (), "?", answer, answer_type, **settings)  # type: ignore[arg-type]
    return Response(f"<think>.</think>\\boxed{{{given}}}", view, finish_reason)


RESPONSES = [
    response("2", "2", "number"),
    response("0.02 m", "2", "number", grading=Grading(unit="cm")),
    response("\\frac{2}{4}", "\\frac{1}{2}", "math"),
    response("x", "\\frac{1}{2}", "math", "length"),
    response("9^{9^{9^{9}}}", "5", "math"),
    response("1" * 600, "1" * 600, "math"),
    response("1" * 2000, "5", "math"),
    response("A or B", "A", "choice"),
    Response("no box", View("q", 0, (), (), "?", "5", "math"), "stop"),
]


def test_together_as_one_by_one(monkeypatch):
    monkeypatch.setattr(math_equivalence, "CPU_SECONDS", 0.4)
    settings = config()
    scored = Scorer(settings).score_all(RESPONSES)
    one_by_one = [score(item.text, item.view, item.finish_reason, settings.reward) for item in RESPONSES]
    assert [item.parts for item in scored] == one_by_one
    assert [item.parts["accuracy"] for item in scored] == [1, 1, 1, 0, 0, 1, 0, 0, 0]
    assert [item.readable for item in scored] == [readable(item.text, item.view) for item in RESPONSES]
    assert Scorer(settings).score_all([]) == []


def test_mathematical_answers_go_to_the_worker_together(monkeypatch):
    calls = []

    def compare_all(pairs, at_once):
        calls.append(list(pairs))
        return dict.fromkeys(pairs, True)

    monkeypatch.setattr("perl_megatron.reward.scorer.compare_all", compare_all)
    monkeypatch.setattr(math_equivalence.MathWorker, "compare_all", lambda *_, **__: pytest.fail("asked one by one"))
    responses = [response(given, "5", "math") for given in ("x", "y", "x")]
    assert [item.parts["accuracy"] for item in Scorer(config()).score_all(responses)] == [1, 1, 1]
    assert calls == [[("5", "x"), ("5", "y"), ("5", "x")]]


def test_functions_have_parts_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "scorer_rewards.py").write_text("def length(text, view, finish_reason): return len(text) / 100")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = config(reward={"functions": ("scorer_rewards:length=-0.5",)})
    scored = Scorer(settings).score_all([Response("\\boxed{7}", View("q", 0, (), (), "?", "7", "number"), "stop")])
    assert scored[0].parts == {"accuracy": 1.0, "format": 0.0, "length": 0.09}
    assert total(scored[0].parts, settings.reward) == 0.855
    sys.modules.pop("scorer_rewards")


def says_red(body: dict) -> Said:
    answer = asked_text(body).rpartition("<student_answer>")[2]
    return Said(texts=(json.dumps({"correct": "crimson" in answer}),))


def test_the_judge_is_asked_where_rules_do_not_decide():
    responses = [
        response("red", "Red", "text"),  # right by the rules
        response("crimson", "red", "text"),
        response("blue", "red", "text"),
        response(" ", "red", "text"),  # nothing to judge
        response("crimson", "2", "number"),  # not a type for the judge
        response("2", "2", "number"),
        Response("I think crimson", View("q", 0, (), (), "?", "red", "text"), "stop"),
    ]
    with ScriptedEndpoint(says_red) as endpoint:
        settings = config(reward={"judge": 0.5, "accuracy": 0.4}, judge={"url": endpoint.url})
        scorer = Scorer(settings)
        scored = scorer.score_all(responses)
        scorer.close()
    assert [item.parts["judge"] for item in scored] == [1, 1, 0, 0, 0, 1, 0]
    assert [item.parts["accuracy"] for item in scored] == [1, 0, 0, 0, 0, 1, 0]
    assert len(endpoint.bodies) == 2
    assert total(scored[1].parts, settings.reward) == 0.6


def test_without_a_weight_nothing_is_asked():
    with ScriptedEndpoint(says_red) as endpoint:
        scored = Scorer(config(judge={"url": endpoint.url})).score_all([response("blue", "red", "text")])
    assert scored[0].parts == {"accuracy": 0.0, "format": 1.0}
    assert endpoint.bodies == []


def test_a_bad_record_is_named():
    with pytest.raises(UserError, match="record q"):
        Scorer(config()).score_all([response("2", "two", "number")])
