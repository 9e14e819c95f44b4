"""Held-out evaluation by whoever answers: views, grades, slots; an endpoint asked for real over HTTP."""

from __future__ import annotations

import base64
import errno
import json
from pathlib import Path

import benchmark_copies
import pytest
from scripted_endpoint import Said, ScriptedEndpoint, asked_text, failed

from perl_megatron import evaluation_job
from perl_megatron.config.schema import Config
from perl_megatron.data.records import write_records
from perl_megatron.errors import UserError
from perl_megatron.evaluation.asking import Reply
from perl_megatron.evaluation.evaluate import evaluate_by
from perl_megatron.types import AnswerRule, PermutationContract, Record


def make_records(folder: Path, count: int = 3) -> list[Record]:
    """Which image is it? The answer is the letter of an image that moves."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        images = []
        for slot in range(3):
            path = folder / f"{number}-{slot}.png"
            path.write_bytes(benchmark_copies.picture(10 * number + 80 * slot))
            images.append(path)
        contract = PermutationContract((0, 1, 2), answer=AnswerRule.OPTION_LETTER, option_slots=(0, 1, 2))
        text = "<image> <image> <image> Which is it? (A) the first (B) the second (C) the third"
        records.append(Record(f"q{number}", tuple(images), text, "B", "choice", contract=contract, kind="which"))
    return records


def config(folder: Path, *, endpoint: str = "", data: Path | None = None, **evaluation: object) -> Config:
    sections = {
        "model": {"path": folder / "nowhere"},
        "run": {"name": "mine", "directory": folder / "runs"},
        "data": {"evaluation": data},
        "endpoint": {"url": endpoint, "retries": 0},
        "evaluation": {"ask": "endpoint", **evaluation},
    }
    return Config.model_validate(sections)


class FirstSlot:
    """Always answers A: right where the image stands first."""

    name = "first"

    def ask(self, views, sampling):
        return [[Reply("<think>x</think>\\boxed{A}", "stop")] * sampling.num_rollouts for _ in views]


def test_grades_and_slots(tmp_path):
    records = make_records(tmp_path)
    result = evaluate_by(FirstSlot(), config(tmp_path, num_orders=6), records)
    assert result.metrics()["evaluation/accuracy"] == pytest.approx(1 / 3)
    assert result.metrics()["evaluation/flip_rate"] == 1.0
    assert result.metrics()["evaluation/num_views"] == 18
    assert {outcome.answered_slot for outcome in result.outcomes} == {0}
    assert sorted(outcome.slot for outcome in result.outcomes) == [0] * 6 + [1] * 6 + [2] * 6
    assert all(outcome.correct == (outcome.slot == 0) for outcome in result.outcomes)
    assert {outcome.reward for outcome in result.outcomes} == {1.0, 0.1}
    row = result.outputs[0]
    assert (row["record"], row["order"], row["answer"], row["rollout"]) == ("q0", [0, 1, 2], "B", 0)


def test_chunks_do_not_matter(tmp_path):
    records, told = make_records(tmp_path), []
    whole = evaluate_by(FirstSlot(), config(tmp_path), records)
    settings = config(tmp_path, chunk_size=5)
    chunked = evaluate_by(FirstSlot(), settings, records, on_chunk=lambda *progress: told.append(progress))
    assert chunked.outputs == whole.outputs
    assert told == [(0, 12), (5, 12), (10, 12), (12, 12)]


def test_a_failed_write_keeps_the_earlier_file(tmp_path, monkeypatch):
    result = evaluate_by(FirstSlot(), config(tmp_path), make_records(tmp_path))
    file = tmp_path / "folder" / "out.jsonl"
    result.write(file)
    before = file.read_bytes()
    assert len(before.splitlines()) == 12

    def full_disk(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        result.write(file)
    assert file.read_bytes() == before


def test_several_rollouts(tmp_path):
    records = make_records(tmp_path, 1)
    result = evaluate_by(FirstSlot(), config(tmp_path, num_orders=2, num_rollouts=3, temperature=1.0), records)
    assert [row["rollout"] for row in result.outputs] == [0, 1, 2, 0, 1, 2]
    assert result.metrics()["evaluation/num_views"] == 2


def test_records_by_endpoint(tmp_path, capsys):
    """The order-bias report of a model behind HTTP that always says A."""
    data = tmp_path / "data"
    write_records_to = data / "heldout.jsonl"
    records = make_records(data)
    write_records(write_records_to, records)
    with ScriptedEndpoint(lambda body: Said(("<think>x</think>\\boxed{A}",) * body.get("n", 1))) as endpoint:
        settings = config(tmp_path, endpoint=endpoint.url, data=write_records_to, num_orders=6)
        assert evaluation_job.by_endpoint(settings) == 0
    assert len(endpoint.bodies) == 18
    body = endpoint.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": settings.data.system_prompt}
    question = body["messages"][1]
    assert asked_text({"messages": [question]}).startswith("[image] [image] [image] Which is it?")
    url = question["content"][0]["image_url"]["url"]
    sent = {base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in question["content"][:5:2]}
    assert url.startswith("data:image/png;base64,")
    assert sent <= {path.read_bytes() for record in records for path in record.images}
    assert (body["temperature"], body.get("max_tokens", body.get("max_completion_tokens"))) == (0.0, 2048)
    report = json.loads((tmp_path / "runs" / "mine.order_bias.json").read_text())
    assert report["accuracy"] == pytest.approx(1 / 3)
    assert [slot["accuracy"] for slot in report["slots"]] == [1.0, 0.0, 0.0]
    assert [slot["answered_share"] for slot in report["slots"]] == [1.0, 0.0, 0.0]
    assert report["flip_rate"] == 1.0
    assert (tmp_path / "runs" / "mine.order_bias.png").is_file()
    assert len((tmp_path / "runs" / "mine.evaluation.jsonl").read_text().splitlines()) == 18
    captured = capsys.readouterr()
    assert "Slots, worst first" in captured.out
    assert "view 18/18" in captured.err


def test_an_interrupted_evaluation_of_records_goes_on(tmp_path):
    """Two chunks of three are answered; the second run asks the rest only, and ends as if nothing had happened."""
    data = tmp_path / "data" / "heldout.jsonl"
    write_records(data, make_records(tmp_path / "data"))
    settings = config(tmp_path, data=data, num_orders=3, chunk_size=3)
    whole = evaluation_job.output_folder(settings, "evaluation.jsonl")
    records = evaluation_job._readable_records(settings)
    evaluation_job._evaluate(settings, Interrupted(), {}, records)
    expected = whole.read_bytes()
    whole.unlink()
    first, second = Interrupted(after=2), Interrupted()
    with pytest.raises(KeyboardInterrupt):
        evaluation_job._evaluate(settings, first, {}, records)
    assert not whole.exists()
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"system_prompt": "Other"})})
    with pytest.raises(UserError, match="other settings"):
        evaluation_job._evaluate(other, second, {}, records)
    evaluation_job._evaluate(settings, second, {}, records)
    assert (len(first.asked), len(second.asked)) == (6, 3)
    assert len({*first.asked, *second.asked}) == 9
    assert whole.read_bytes() == expected
    assert not (tmp_path / "runs" / "mine.unfinished").exists()


def test_views_without_an_answer_are_asked_again(tmp_path):
    data = tmp_path / "data" / "heldout.jsonl"
    write_records(data, make_records(tmp_path / "data"))
    failing = {"q1"}
    settings = config(tmp_path, data=data, num_orders=2)
    records = evaluation_job._readable_records(settings)
    evaluation_job._evaluate(settings, Interrupted(failing=failing), {}, records)
    again = Interrupted()
    evaluation_job._evaluate(settings, again, {}, records)
    assert {record for record, _ in again.asked} == failing
    assert len(again.asked) == 2


class Interrupted(FirstSlot):
    """Answers A until it is interrupted; to some records with an error."""

    def __init__(self, *, after=None, failing=()):
        self.asked, self._after, self._failing = [], after, failing

    def ask(self, views, sampling):
        if self._after is not None and len(self.asked) >= 3 * self._after:
            raise KeyboardInterrupt
        self.asked += [(view.record_id, view.order) for view in views]
        replies = super().ask(views, sampling)
        failed = [Reply("", "error", "the endpoint is down")] * sampling.num_rollouts
        return [
            failed if view.record_id in self._failing else reply for view, reply in zip(views, replies, strict=True)
        ]


def test_benchmarks_by_endpoint_go_on_after_failures(tmp_path, capsys):
    """One request is refused, the endpoint fails at another; the second run asks those two only."""
    copies = benchmark_copies.mantis_eval(benchmark_copies.blink(tmp_path / "copies", per_task=2))

    def script(body):
        text = asked_text(body)
        if "Counting, question 2" in text and failing:
            return failed(400, "the prompt is too long")
        if "What colour" in text and failing:
            return failed(500)
        return Said(("<think>x</think> \\boxed{blue}" if "What colour" in text else "\\boxed{B}",))

    failing = True
    with ScriptedEndpoint(script) as endpoint:
        settings = config(
            tmp_path, endpoint=endpoint.url, benchmarks="blink,mantis_eval", benchmark_folder=copies, chunk_size=3
        )
        evaluation_job.by_endpoint(settings)
        first = json.loads((tmp_path / "runs" / "mine.benchmarks" / "results.json").read_text())["benchmarks"]
        asked = len(endpoint.bodies)
        failing = False
        evaluation_job.by_endpoint(settings)
        again = [asked_text({"messages": body["messages"][1:]}) for body in endpoint.bodies[asked:]]
    assert first["blink"]["micro"]["value"] == 0.75
    assert first["blink"]["whole"]["num_not_asked"] == 1
    assert "too long" in next(iter(first["blink"]["reasons"]))
    assert first["mantis_eval"]["micro"]["value"] == 0.0  # B for A, and no answer
    assert sorted(text.partition("?")[0] for text in again) == [
        "[image] [image] What colour",
        "[image][image]\nCounting, question 2. Which one",
    ]
    folder = tmp_path / "runs" / "mine.benchmarks"
    results = json.loads((folder / "results.json").read_text())
    assert results["benchmarks"]["blink"]["micro"]["value"] == 1.0
    assert results["benchmarks"]["mantis_eval"]["micro"]["value"] == 0.5
    assert results["settings"]["temperature"] == 0.0
    text = (folder / "results.md").read_text()
    assert "## BLINK" in text
    assert "| mine | 50.00 ±" in text
    assert "MMIU" in text
    assert "macro (mean of tasks)" in capsys.readouterr().out


def test_images_are_resized_for_an_endpoint_too(tmp_path):
    """With data.max_pixels the endpoint sees what an engine would."""
    data = tmp_path / "data"
    file = data / "heldout.jsonl"
    write_records(file, make_records(data, 1))
    with ScriptedEndpoint(lambda body: Said(("\\boxed{A}",))) as endpoint:
        settings = config(tmp_path, endpoint=endpoint.url, data=file, num_orders=1)
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"min_pixels": 56 * 56})})
        evaluation_job.by_endpoint(settings)
    part = endpoint.bodies[0]["messages"][1]["content"][0]
    content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    assert content[16:24] == (56).to_bytes(4) * 2  # width and height in a PNG's header
