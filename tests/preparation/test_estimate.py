"""A dry run: what would be asked and what it costs, with nobody asked and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from mantis_case import answer_by_rules, settings, write_table
from scripted_endpoint import ScriptedEndpoint, asked_text

from perl_megatron.preparation.estimate import StageCost, count_by_characters, estimate, image_tokens
from perl_megatron.preparation.pipeline import Pipeline


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("mantis"))


def costs_of(pipeline: Pipeline, num_shown: int = 0) -> tuple[dict[str, StageCost], list[tuple[str, str, str]]]:
    shown: list[tuple[str, str, str]] = []
    costs = estimate(
        pipeline, num_shown=num_shown, count_tokens=count_by_characters, show=lambda *given: shown.append(given)
    )
    return {cost.stage: cost for cost in costs}, shown


def test_before_anything_is_done(source, tmp_path):
    pipeline = Pipeline(settings(source, "http://127.0.0.1:9/v1"), tmp_path / "out")
    costs, shown = costs_of(pipeline, num_shown=2)
    assert not (tmp_path / "out").exists()
    assert costs["rephrase"].num_requests == costs["rephrase"].num_replies == 12  # the open questions
    assert costs["rephrase"].reply_tokens == 12 * 1024
    assert (costs["difficulty"].num_requests, costs["difficulty"].num_replies) == (22, 220)
    assert costs["difficulty"].reply_tokens == 220 * 64
    # Pictures of 40 × 30 are enlarged to 84 × 56: six tokens, and two around them.
    num_images = sum(2 + k % 3 for k in range(10)) + sum(2 + k % 2 for k in range(12))
    assert costs["difficulty"].image_tokens == num_images * 8
    assert costs["rephrase"].image_tokens == 0
    assert costs["label"].num_requests == 12  # what resample.size leaves
    assert [(stage, name) for stage, name, _ in shown] == [
        ("rephrase", "open-0"),
        ("rephrase", "open-1"),
        ("difficulty", "choice-0"),
        ("difficulty", "choice-1"),
        ("label", "choice-0"),
        ("label", "choice-1"),
    ]


def test_what_is_shown_and_counted_is_what_is_sent(source, tmp_path):
    with ScriptedEndpoint(answer_by_rules) as endpoint:
        pipeline = Pipeline(settings(source, endpoint.url), tmp_path / "out")
        pipeline.run("rules")
        costs, shown = costs_of(pipeline, num_shown=99)
        assert endpoint.bodies == []
        pipeline.run("rephrase")
        sent = [asked_text(body) for body in endpoint.bodies if len(body["messages"]) == 2]
    planned = [text for stage, _, text in shown if stage == "rephrase"]
    assert [text.replace("\n", "") for text in planned] == [text.replace("\n", "") for text in sent]
    assert costs["rephrase"].text_tokens == pytest.approx(sum(map(len, sent)) / 4 + 12 * 10, rel=0.01)


def test_what_is_done_costs_nothing_more(source, tmp_path):
    with ScriptedEndpoint(answer_by_rules) as endpoint:
        pipeline = Pipeline(settings(source, endpoint.url), tmp_path / "out")
        pipeline.run("rephrase")
    before = sorted(path for path in (tmp_path / "out").rglob("*"))
    costs, shown = costs_of(pipeline, num_shown=1)
    assert costs["rephrase"].is_done
    assert costs["difficulty"].num_requests == 18  # those that are left
    assert [stage for stage, _, _ in shown] == ["difficulty", "label"]
    assert sorted(path for path in (tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize(
    ("size", "tokens"), [((28, 28), 3), ((280, 280), 102), ((1000, 28), 38), ((28, 28 * 300), 0), ((5000, 5000), 1158)]
)
def test_tokens_of_an_image(size, tokens):
    assert image_tokens((size,), min_pixels=784, max_pixels=910_000) == tokens
