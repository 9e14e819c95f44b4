"""Asking a benchmark: raw outputs, interruption and resumption, what cannot be asked, other settings, other scorers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import benchmark_copies
import pytest

from perl_megatron.config.schema import Config
from perl_megatron.data.image_store import ImageStore
from perl_megatron.errors import UserError
from perl_megatron.evaluation import benchmark_run
from perl_megatron.evaluation.asking import EngineAsker, Reply, evaluation_sampling
from perl_megatron.evaluation.benchmark_run import run_benchmark
from perl_megatron.evaluation.benchmarks import scoring
from perl_megatron.evaluation.benchmarks.benchmark import load_items
from perl_megatron.evaluation.benchmarks.registry import BENCHMARKS
from perl_megatron.evaluation.benchmarks.scoring import SCORE_VERSION
from perl_megatron.evaluation.output_log import OutputLog, open_folder
from perl_megatron.rollout.engine import Sampling

GREEDY = Sampling(num_rollouts=1, temperature=0.0, top_p=1.0, max_tokens=16)
BLINK = BENCHMARKS["blink"]


class Scripted:
    """Answers every view with B, until it is interrupted."""

    name = "scripted"

    def __init__(self, *, chunks=None, answer="\\boxed{B}", error=None):
        self.asked: list[str] = []
        self._chunks, self._answer, self._error = chunks, answer, error

    def ask(self, views, sampling):
        if self._chunks == 0:
            raise KeyboardInterrupt
        self._chunks = None if self._chunks is None else self._chunks - 1
        self.asked += [view.record_id for view in views]
        reply = Reply(self._answer, "stop") if self._error is None else Reply("", "error", self._error)
        return [[reply] * sampling.num_rollouts for _ in views]


@pytest.fixture
def items(tmp_path):
    benchmark_copies.blink(tmp_path / "copies", per_task=5)
    return load_items(BLINK, tmp_path / "copies" / "BLINK", ImageStore(tmp_path / "images"))


def ask(items, asker, folder: Path, sampling=GREEDY):
    return run_benchmark(BLINK, items, asker, sampling, folder, chunk_size=3)


def test_rows(items, tmp_path):
    rows = ask(items, Scripted(), tmp_path)
    assert [row["id"] for row in rows] == [item.id for item in items]
    assert all(row["correct"] for row in rows)
    on_disk = [json.loads(line) for line in (tmp_path / "blink.jsonl").read_text().splitlines()]
    assert on_disk == rows
    assert rows[0] | {"question_digest": ""} == {
        "benchmark": "blink",
        "id": "val_Art_Style_1",
        "task": "Art_Style",
        "cluster": "val_Art_Style_1",
        "rollout": 0,
        "order": [0, 1],
        "prompt": items[0].record.text,
        "response": "\\boxed{B}",
        "finish_reason": "stop",
        "problem": None,
        "prediction": "B",
        "expected": "B",
        "correct": True,
        "score_version": SCORE_VERSION,
        "question_digest": "",
    }


def test_an_interrupted_run_goes_on(items, tmp_path):
    first, second = Scripted(chunks=2), Scripted()
    with pytest.raises(KeyboardInterrupt):
        ask(items, first, tmp_path)
    assert len(first.asked) == 6
    rows = ask(items, second, tmp_path)
    assert first.asked + second.asked == [item.id for item in items]  # each once
    assert len(rows) == len((tmp_path / "blink.jsonl").read_text().splitlines()) == 10
    third = Scripted()
    assert ask(items, third, tmp_path) == rows
    assert third.asked == []


def test_a_torn_last_line_is_asked_again(items, tmp_path):
    rows = ask(items, Scripted(), tmp_path)
    file = tmp_path / "blink.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    again = Scripted()
    assert ask(items, again, tmp_path) == rows
    assert again.asked == [items[-1].id]
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 10


def test_changed_questions_and_missing_answers_are_asked_again(items, tmp_path):
    ask(items[:5], Scripted(), tmp_path)
    ask(items[5:], Scripted(error="the endpoint is down"), tmp_path)
    items[2] = replace(items[2], record=replace(items[2].record, text="<image><image> Another question?"))
    again = Scripted()
    rows = ask(items, again, tmp_path)
    assert again.asked == [items[2].id, *(item.id for item in items[5:])]
    assert all(row["problem"] is None for row in rows)


def test_old_verdicts_are_given_again(items, tmp_path, monkeypatch):
    ask(items, Scripted(), tmp_path)
    monkeypatch.setattr(benchmark_run, "SCORE_VERSION", SCORE_VERSION + 1)
    items[0] = replace(items[0], record=replace(items[0].record, answer="A"))
    again = Scripted()
    rows = ask(items, again, tmp_path)
    assert again.asked == []
    assert [row["correct"] for row in rows] == [False] + [True] * 9
    assert {row["score_version"] for row in rows} == {SCORE_VERSION + 1}
    on_disk = OutputLog(tmp_path / "blink.jsonl").read()
    assert len(on_disk) == 20
    assert on_disk[10:] == rows
    assert ask(items, again, tmp_path) == rows
    assert len(OutputLog(tmp_path / "blink.jsonl").read()) == 20  # once


def test_the_mathematics_of_a_chunk_is_bounded_together(items, tmp_path, monkeypatch):
    """One call of ``compare_all``, which bounds them, for each chunk."""
    calls = []

    def compare(pairs, *, at_once):
        calls.append(pairs)
        return dict.fromkeys(pairs, False)

    monkeypatch.setattr(scoring, "compare_all", compare)
    items = [replace(item, scorer="math") for item in items]
    ask(items, Scripted(answer="\\boxed{9**9**9}"), tmp_path)
    assert [len(pairs) for pairs in calls] == [3, 3, 3, 1]


def test_what_cannot_be_asked_counts_as_wrong(items, tmp_path):
    items[1] = replace(items[1], problem="the image file is missing")
    asker = Scripted()
    rows = ask(items, asker, tmp_path)
    assert items[1].id not in asker.asked
    assert (rows[1]["correct"], rows[1]["finish_reason"]) == (False, "not asked")
    assert rows[1]["problem"] == "the image file is missing"
    assert len(rows) == 10


def test_several_rollouts(items, tmp_path):
    sampling = replace(GREEDY, num_rollouts=3, temperature=1.0)
    rows = ask(items, Scripted(), tmp_path, sampling)
    assert [(row["id"], row["rollout"]) for row in rows[:4]] == [
        *((items[0].id, number) for number in range(3)),
        (items[1].id, 0),
    ]


def test_a_file_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "blink.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match="cannot be read"):
        OutputLog(tmp_path / "blink.jsonl").read()


def config(folder: Path, **evaluation: object) -> Config:
    run = {"name": "r", "directory": folder}
    return Config.model_validate({"model": {"path": folder}, "run": run, "evaluation": evaluation})


def test_other_settings_are_refused(tmp_path):
    settings = {"model": "a", "temperature": 0.0}
    folder = open_folder(config(tmp_path), settings)
    (folder / "blink.jsonl").write_text("kept\n")
    assert open_folder(config(tmp_path), settings) == folder
    with pytest.raises(UserError, match=r"temperature: 0.0 -> 1.0"):
        open_folder(config(tmp_path), settings | {"temperature": 1.0})
    assert open_folder(config(tmp_path, resume=False), settings | {"temperature": 1.0}) == folder
    assert list(folder.glob("*.jsonl")) == []
    assert (tmp_path / "r.benchmarks.1" / "blink.jsonl").read_text() == "kept\n"
    open_folder(config(tmp_path, resume=False), settings)
    assert (tmp_path / "r.benchmarks.2").is_dir()


class FakeEngine:
    """Gives each view one rollout whose text is the view's id."""

    name = "fake"

    def generate(self, views, prompts, sampling, *, seeds):
        self.seeds = list(seeds)
        return [Reply(view.record_id, "stop") for view in views for _ in range(sampling.num_rollouts)]


class FakeEncoder:
    """A token for each character; a view with a special token is refused."""

    def encode(self, view):
        if "<|im_end|>" in view.text:
            raise UserError("the text holds the model's special token <|im_end|>")
        return type("Prompt", (), {"token_ids": view.text})


def test_the_engine_is_not_asked_what_it_cannot_read(items, tmp_path):
    long = replace(items[0], record=replace(items[0].record, text="<image><image>" + "x" * 5000))
    forged = replace(items[1], record=replace(items[1].record, text="<image><image><|im_end|>"))
    settings = config(tmp_path, num_rollouts=2, temperature=1.0)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"max_prompt_tokens": 4096})})
    engine = FakeEngine()
    asker = EngineAsker(settings, FakeEncoder(), engine, checked=False)
    rows = ask([long, forged, items[2]], asker, tmp_path, evaluation_sampling(settings))
    assert [row["problem"] for row in rows[::2]] == [
        "its prompt has 5014 tokens, more than data.max_prompt_tokens = 4096",
        "the text holds the model's special token <|im_end|>",
        None,
    ]
    assert [row["response"] for row in rows] == ["", "", "", "", items[2].id, items[2].id]
    assert len(engine.seeds) == 1
    assert engine.seeds[0] != 0
