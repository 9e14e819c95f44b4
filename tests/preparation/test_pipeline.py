"""All stages over thirty rows with a scripted endpoint: what comes out, and that interruptions change nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from mantis_case import answer_by_rules, contents, copied_until, lines, settings, write_table
from scripted_endpoint import Said, ScriptedEndpoint, asked_text, failed

from perl_megatron.data.records import read_records
from perl_megatron.errors import UserError
from perl_megatron.preparation.pipeline import STAGES, Pipeline
from perl_megatron.preparation.question import Outcome
from perl_megatron.types import AnswerRule


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("mantis"))


@pytest.fixture(scope="module")
def endpoint():
    with ScriptedEndpoint(answer_by_rules) as started:
        yield started


@pytest.fixture(scope="module")
def finished(source, endpoint, tmp_path_factory) -> Pipeline:
    """An uninterrupted run."""
    pipeline = Pipeline(settings(source, endpoint.url), tmp_path_factory.mktemp("run") / "out")
    pipeline.run()
    return pipeline


@pytest.fixture(autouse=True)
def _nothing_asked_yet(finished, endpoint) -> None:
    endpoint.script = answer_by_rules
    endpoint.bodies.clear()


def kinds_asked(endpoint: ScriptedEndpoint) -> Counter[str]:
    names = [body.get("response_format", {"json_schema": {"name": "difficulty"}}) for body in endpoint.bodies]
    return Counter(name["json_schema"]["name"] for name in names)


def test_what_goes_in_and_comes_out(finished):
    counts = {name: (count.num_in, count.kept, dict(count.dropped)) for name, count in finished.counts.items()}
    assert counts["rules"] == (
        30,
        22,
        {
            "fewer than 2 images": 1,
            "more than 8 images": 1,
            "the conversation has more <image> placeholders than images": 1,
            "the answer is too long": 1,
            "too few Latin letters": 1,
            "the answer is none of the options": 1,
            "it is a duplicate": 1,
            "an image cannot be read": 1,
        },
    )
    assert counts["rephrase"] == (
        22,
        18,
        {
            "the model finds no multiple-choice question": 1,
            "the answer is none of the options": 1,
            "no usable reply": 1,
            "the images of the rephrased text are not those of the question": 1,
        },
    )
    assert counts["difficulty"] == (18, 18, {})
    assert counts["resample"] == (18, 12, {"there are enough questions of its accuracy": 6})
    assert counts["label"][:2] == counts["contract"][:2] == (12, 12)
    written = json.loads((finished.folder / "counts.json").read_text())
    assert written["stages"]["rules"]["in"] == 30
    assert sum(written["resample"]["counts"]) == 12
    permutable = sum(
        record["contract"]["answer"] != "not_permutable" for record in lines(finished.folder / "records.jsonl")
    )
    assert written["contracts"]["permutable"] == permutable > 0
    assert sum(written["contracts"].values()) == 12


def test_the_records_are_what_training_reads(finished):
    dataset = read_records(finished.folder / "records.jsonl", max_corrupt_fraction=0)
    assert (len(dataset.records), dataset.dropped) == (12, ())
    for record in dataset.records:
        assert record.answer_type == "choice"
        assert record.grading.options[ord(record.answer) - ord("A")]
        assert len(record.images) >= 2
    contracts = {record.id: record.contract for record in dataset.records}
    sequence = contracts.pop("choice-9", None)
    assert sequence is None or "sequence" in sequence.reason
    for row in lines(finished.folder / "05_label.jsonl"):
        if row["id"] in contracts and not row["label"]["should_change"]:
            assert contracts[row["id"]].answer is AnswerRule.UNCHANGED
            assert contracts[row["id"]].movable == tuple(range(len(row["images"])))
    assert sum(contract.permutable for contract in contracts.values()) >= 6


def test_accuracies_are_those_of_the_responses(finished):
    raw = {row["id"]: row["responses"] for row in lines(finished.folder / "03_difficulty.raw.jsonl")}
    accuracies = {row["id"]: row["accuracy"] for row in lines(finished.folder / "03_difficulty.jsonl")}
    assert {len(responses) for responses in raw.values()} == {10}
    for name, accuracy in accuracies.items():
        assert accuracy == sum(response["right"] for response in raw[name]) / 10
    assert len(set(accuracies.values())) >= 3


def interrupted_at(stage: str, after: int):
    def watch(name: str, outcomes: Iterable[Outcome], total: int | None) -> Iterator[Outcome]:
        for number, outcome in enumerate(outcomes):
            if name == stage and number == after:
                raise KeyboardInterrupt
            yield outcome

    return watch


@pytest.mark.parametrize(("stage", "after"), [("difficulty", 0), *((stage, 5) for stage in STAGES)])
def test_an_interruption_changes_nothing_and_nothing_is_asked_twice(finished, source, endpoint, tmp_path, stage, after):
    given, folder = settings(source, endpoint.url), copied_until(stage, finished.folder, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        Pipeline(given, folder, watch=interrupted_at(stage, after)).run()
    Pipeline(given, folder).run()
    assert contents(folder) == contents(finished.folder)
    asked = Counter(json.dumps(body, sort_keys=True) for body in endpoint.bodies)
    # The one request that is under way while the client is closed is abandoned.
    assert sum(asked.values()) - len(asked) <= 1


@pytest.mark.parametrize("name", ["01_rules.jsonl", "02_rephrase.dropped.jsonl", "03_difficulty.raw.jsonl"])
def test_a_torn_line_is_written_again(finished, source, endpoint, tmp_path, name):
    stage = name.split(".")[0][3:]
    given, folder = settings(source, endpoint.url), copied_until(stage, finished.folder, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        Pipeline(given, folder, watch=interrupted_at(stage, 17)).run()
    with (folder / name).open("r+b") as file:
        file.truncate((folder / name).stat().st_size - 7)
    if name.endswith(".raw.jsonl"):  # the question's own line comes after its raw output
        path = folder / "03_difficulty.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    Pipeline(given, folder).run()
    assert contents(folder) == contents(finished.folder)


def test_a_finished_run_does_nothing_again(finished, endpoint):
    before = contents(finished.folder)
    again = Pipeline(finished.settings, finished.folder)
    again.run()
    assert endpoint.bodies == []
    assert contents(finished.folder) == before
    assert {name: count.values() for name, count in again.counts.items()} == {
        name: count.values() for name, count in finished.counts.items()
    }


def test_what_is_not_answered_is_asked_again_and_ends_in_its_place(finished, source, endpoint, tmp_path):
    def partly_broken(body: dict) -> Said:
        return failed(500, "overloaded") if "pictures" in asked_text(body) else answer_by_rules(body)

    given, folder = settings(source, endpoint.url), copied_until("rephrase", finished.folder, tmp_path / "out")
    endpoint.script = partly_broken
    with pytest.raises(UserError, match=r"were not answered: .*overloaded") as caught:
        Pipeline(given, folder).run()
    assert caught.value.where == "stage 'rephrase'"
    assert not (folder / "03_difficulty.jsonl").exists()
    counts = json.loads((folder / "counts.json").read_text())["stages"]["rephrase"]
    assert counts["in"] == 22
    assert sum(counts["unanswered"].values()) > 0
    endpoint.script = answer_by_rules
    Pipeline(given, folder).run()
    assert contents(folder) == contents(finished.folder)


def test_a_changed_setting_redoes_its_stage_and_the_later_ones(finished, source, endpoint, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished.folder, folder)
    changed = Pipeline(settings(source, endpoint.url, "resample.size=9"), folder)
    changed.run()
    assert kinds_asked(endpoint) == {}  # labels of the questions that stay are known
    assert changed.counts["resample"].kept == 9
    assert len(lines(folder / "records.jsonl")) == 9
    assert changed.put_aside == folder / "replaced" / "1"
    assert (folder / "replaced" / "1" / "records.jsonl").read_bytes() == contents(finished.folder)["records.jsonl"]
    assert (folder / "01_rules.jsonl").read_bytes() == contents(finished.folder)["01_rules.jsonl"]

    Pipeline(settings(source, endpoint.url, "difficulty.num_rollouts=4"), folder).run()
    assert kinds_asked(endpoint)["difficulty"] == 18
    assert kinds_asked(endpoint)["rephrase"] == 0
    seeds = {body["seed"] for body in endpoint.bodies if "response_format" not in body}
    assert len(seeds) == 18  # each question has its own, so that a known reply is that of the same sampling
    assert (folder / "replaced" / "2" / "03_difficulty.raw.jsonl").exists()


def test_a_changed_source_starts_from_the_beginning(finished, source, endpoint, tmp_path):
    folder = copied_until("rephrase", finished.folder, tmp_path / "out")
    shutil.copytree(source, tmp_path / "elsewhere")
    moved = Pipeline(settings(tmp_path / "elsewhere", endpoint.url), folder)
    moved.run("rules")
    assert moved.put_aside is None  # the same tables
    (table,) = (tmp_path / "elsewhere").rglob("*.parquet")
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(table)[:20], table)
    changed = Pipeline(settings(tmp_path / "elsewhere", endpoint.url), folder)
    changed.run("rules")
    assert changed.put_aside is not None
    assert changed.counts["rules"].num_in == 20


def test_repeats_have_ids_of_their_own(finished, source, endpoint, tmp_path):
    given = settings(source, endpoint.url, "resample.size=40", "resample.allow_repeats=true")
    pipeline = Pipeline(given, copied_until("resample", finished.folder, tmp_path / "out"))
    pipeline.run()
    count = pipeline.counts["resample"]
    assert (count.num_in, count.kept) == (18, 40)
    assert len(read_records(tmp_path / "out" / "records.jsonl", max_corrupt_fraction=0).records) == 40


def test_unpermutable_records_can_be_left_out(finished, source, endpoint, tmp_path):
    given = settings(source, endpoint.url, "output.keep_unpermutable=false", "resample.size=18")
    pipeline = Pipeline(given, copied_until("resample", finished.folder, tmp_path / "out"))
    pipeline.run()
    records = read_records(tmp_path / "out" / "records.jsonl", max_corrupt_fraction=0).records
    assert all(record.contract.permutable for record in records)
    assert len(records) == 18 - pipeline.counts["contract"].dropped["its images must not move"] < 18
    reasons = {row["id"]: row["detail"] for row in lines(tmp_path / "out" / "06_contract.dropped.jsonl")}
    assert "sequence" in reasons["choice-9"]


def test_two_at_once_are_refused(finished, monkeypatch):
    def second(name: str, outcomes: Iterable[Outcome], total: int | None) -> Iterable[Outcome]:
        raise AssertionError("the second one started")

    from perl_megatron.preparation.manifest import only_one

    with only_one(finished.folder), pytest.raises(UserError, match="another process"):
        Pipeline(finished.settings, finished.folder, watch=second).run()


@pytest.mark.parametrize(("section", "stage"), [("endpoint", "rephrase"), ("policy_endpoint", "difficulty")])
def test_nobody_to_ask(source, endpoint, tmp_path, section, stage):
    given = settings(source, endpoint.url, f"{section}.url=")
    with pytest.raises(UserError, match=f"'{stage}' has nobody to ask") as caught:
        Pipeline(given, tmp_path / "out").run()
    assert caught.value.where == f"{section}.url"
