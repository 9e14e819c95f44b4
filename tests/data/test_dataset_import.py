import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from foreign_rows import EASYR1, MANTIS, MMK12, PLAIN, VERL, embedded, png, write_lines, write_parquet, write_scans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool_functions import die_over

from perl_megatron.data import dataset_import as module
from perl_megatron.data.contract.contract_templates import load_templates
from perl_megatron.data.dataset_import import ImportCounts, import_dataset
from perl_megatron.data.records import read_records
from perl_megatron.data.row_import import NumberedRow, RowSettings, convert_rows
from perl_megatron.errors import UserError
from perl_megatron.record_check import check_answer
from perl_megatron.types import AnswerRule, Grading, PermutationContract, Record, ReferenceRule


def settings_for(source: Path, target: Path, format: str, **changes) -> RowSettings:
    root = source if source.is_dir() else source.parent
    given = {"image_root": root, "source": "pets", "check": check_answer} | changes
    return RowSettings(format=format, target=target, **given)


def imported(source: Path, target: Path, format: str, on_progress=lambda counts: None, **changes) -> ImportCounts:
    wanted = settings_for(source, target, format, **changes)
    return import_dataset(source, wanted, num_processes=1, on_progress=on_progress)


def read(target: Path) -> tuple[Record, ...]:
    return read_records(target / "records.jsonl", max_corrupt_fraction=0).records


def dropped(target: Path) -> list[dict]:
    return [json.loads(line) for line in (target / "dropped.jsonl").read_text().splitlines()]


def files(target: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(target)): path for path in sorted(target.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "import.json"}


def test_a_folder_of_parquet_files_becomes_records_and_a_store(tmp_path):
    source, target = tmp_path / "mantis", tmp_path / "target"
    write_parquet(source / "nlvr2/train-0.parquet", [MANTIS[0]])
    write_parquet(source / "iconqa/train-0.parquet", [MANTIS[1], MANTIS[0]])
    counts = imported(source, target, "mantis")
    assert (counts.rows, counts.records, counts.images, counts.dropped) == (3, 2, 3, 1)
    assert counts.sources == {"iconqa": 1, "nlvr2": 1}
    first, second = read(target)
    assert (first.id, first.answer, first.answer_type, first.kind) == ("iconqa_7", "A cat.", "text", "iconqa")
    assert (second.answer, second.answer_type, second.grading) == ("B", "choice", Grading(("True", "False")))
    assert [image.read_bytes() for image in second.images] == [png(1), png(2)]
    assert not second.contract.permutable
    (duplicate,) = dropped(target)
    assert duplicate["id"] == "nlvr2_1"
    assert duplicate["reason"] == "the id is used before"
    assert duplicate["where"] == f"{source}/nlvr2/train-0.parquet:1"


@pytest.mark.parametrize(
    ("format", "rows", "ids", "answers"),
    [
        ("mmk12", MMK12, ["17"], [("\\frac{3}{4}", "math")]),
        ("verl", VERL, ["geometry3k-train-3"], [("48", "number")]),
        ("easyr1", EASYR1, ["train:1"], [("2.5", "number")]),
    ],
)
def test_the_other_formats(tmp_path, format, rows, ids, answers):
    imported(write_parquet(tmp_path / "train.parquet", rows), tmp_path / "target", format)
    records = read(tmp_path / "target")
    assert [record.id for record in records] == ids
    assert [(record.answer, record.answer_type) for record in records] == answers


def test_plain_lines_and_their_images(tmp_path):
    write_scans(tmp_path)
    source = write_lines(tmp_path / "train.jsonl", PLAIN)
    imported(source, tmp_path / "target", "jsonl", prefix="x-", answer_type="text")
    first, second = read(tmp_path / "target")
    assert (first.id, first.answer, first.answer_type) == ("x-p1", "the cat", "text")
    assert [image.read_bytes() for image in first.images] == [png(0), png(1)]
    assert second.images == first.images[:1]  # one file for one image


def test_all_turns_of_a_conversation(tmp_path):
    imported(write_parquet(tmp_path / "a.parquet", MANTIS), tmp_path / "target", "mantis", all_turns=True)
    assert [record.id for record in read(tmp_path / "target")] == ["nlvr2_1", "nlvr2_1#2", "iconqa_7"]


def test_our_own_records_keep_everything_but_their_images_places(tmp_path):
    write_scans(tmp_path)
    line = {
        **{"id": "q", "images": ["scans/a.png", "scans/b.png"], "text": "<image><image>Which is image 2?"},
        **{"answer": "7", "answer_type": "number", "contract": {"movable": [0, 1], "references": ["index"]}},
        "demonstration": "7",
    }
    source = write_lines(tmp_path / "train.jsonl", [line])
    imported(source, tmp_path / "target", "records")
    (before,), (after,) = read_records(source, max_corrupt_fraction=0).records, read(tmp_path / "target")
    assert (after.contract, after.demonstration, after.text) == (before.contract, before.demonstration, before.text)
    assert [image.parent.parent for image in after.images] == [tmp_path / "target/images"] * 2


def test_bad_rows_are_named(tmp_path):
    write_scans(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes(png(9))
    (tmp_path / "data/cut.png").write_bytes(png(3)[:40])
    bad = [
        (PLAIN[1] | {"image": "../secret.png"}, "leaves the dataset's folder"),
        (PLAIN[1] | {"image": str(tmp_path / "secret.png")}, "leaves the dataset's folder"),
        (PLAIN[1] | {"image": "none.png"}, "No such file"),
        (PLAIN[1] | {"image": "cut.png"}, "cannot read the image"),
        (PLAIN[1] | {"image": "scans"}, "cannot read the image"),
        (PLAIN[1] | {"answer": "\ud800"}, "surrogates not allowed"),
        (PLAIN[1] | {"image": None, "images": []}, "1 <image> placeholders for 0 images"),
        ([], "no object of columns"),
    ]
    source = write_lines(tmp_path / "data/train.jsonl", [row for row, _ in bad] + PLAIN)
    with source.open("a") as file:
        file.write('{"question": ')
    counts = imported(source, tmp_path / "target", "jsonl")
    assert (counts.rows, counts.records, counts.dropped) == (11, 2, 9)
    found = dropped(tmp_path / "target")
    for number, (line, (_, reason)) in enumerate(zip(found, bad, strict=False), start=1):
        assert reason in line["reason"], line
        assert line["where"] == f"{source}:{number}"
    assert found[-1]["where"] == f"{source}:11"
    assert sum(counts.reasons.values()) == 9
    assert counts.reasons["the image path … leaves the dataset's folder"] == 2


def test_contracts_are_given_by_the_source(tmp_path):
    statement = {"role": "user", "content": "<image><image>The left image shows a dog. (A) True (B) False"}
    row = MANTIS[0] | {"conversation": [statement, {"role": "assistant", "content": "B"}], "source": "lil-lab/NLVR2"}
    source = write_parquet(tmp_path / "a.parquet", [row, MANTIS[1]])
    counts = imported(source, tmp_path / "target", "mantis", templates=load_templates())
    first, second = read(tmp_path / "target")
    assert first.contract == PermutationContract((0, 1), first.contract.references, AnswerRule.UNCHANGED)
    assert ReferenceRule.POSITION in first.contract.references
    assert second.contract.answer is AnswerRule.NOT_PERMUTABLE
    assert counts.not_permutable == {"there are fewer than two images": 1}


def many(tmp_path: Path) -> Path:
    rows = [{"id": f"q{n}", "images": [embedded(n % 50)], "problem": "?", "answer": str(n)} for n in range(60)]
    return write_lines(tmp_path / "many.jsonl", [row | {"images": ["scans/a.png"]} for row in rows] + ["{"])


@pytest.mark.parametrize("stop_after", [1, 30, 59])
def test_an_interrupted_import_goes_on(tmp_path, stop_after, monkeypatch):
    monkeypatch.setattr(module, "BATCH_ROWS", 7)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    write_scans(tmp_path)
    source = many(tmp_path)
    whole = imported(source, tmp_path / "whole", "easyr1")

    def interrupt(counts: ImportCounts) -> None:
        if counts.rows >= stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imported(source, tmp_path / "target", "easyr1", on_progress=interrupt)
    assert not (tmp_path / "target/records.jsonl").exists()
    for name in ("records.jsonl.part", "dropped.jsonl"):
        with (tmp_path / "target" / name).open("a") as file:
            file.write("half a li")  # what a killed process leaves behind the last note
    with suppress(KeyboardInterrupt):  # where anything was left to do
        imported(source, tmp_path / "target", "easyr1", on_progress=interrupt)
    seen: list[int] = []
    again = imported(source, tmp_path / "target", "easyr1", on_progress=lambda counts: seen.append(counts.rows))
    assert again == whole
    assert min(seen, default=61) > stop_after
    assert files(tmp_path / "target") == files(tmp_path / "whole")


def test_an_import_that_ended_between_its_last_two_writes_goes_on(tmp_path):
    write_scans(tmp_path)
    source = many(tmp_path)
    whole = imported(source, tmp_path / "target", "easyr1")
    before = files(tmp_path / "target")
    state = json.loads((tmp_path / "target/import.json").read_text())
    (tmp_path / "target/import.json").write_text(json.dumps(state | {"complete": False}))
    assert imported(source, tmp_path / "target", "easyr1") == whole
    assert files(tmp_path / "target") == before


def test_a_complete_import_is_not_done_again_and_another_one_not_mixed_in(tmp_path):
    write_scans(tmp_path)
    source = many(tmp_path)
    imported(source, tmp_path / "target", "easyr1")
    before = (tmp_path / "target/records.jsonl").stat().st_mtime_ns
    imported(source, tmp_path / "target", "easyr1", on_progress=None)  # never called
    assert (tmp_path / "target/records.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="import of something else"):
        imported(source, tmp_path / "target", "easyr1", prefix="x")
    os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match="import of something else"):
        imported(source, tmp_path / "target", "easyr1")
    write_lines(tmp_path / "other/records.jsonl", [])
    with pytest.raises(UserError, match="holds records already"):
        imported(source, tmp_path / "other", "easyr1")


def test_a_row_that_ends_its_process_is_the_only_one_lost(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", MANTIS)
    counts = imported(source, tmp_path / "target", "mantis", check=die_over)
    assert (counts.records, counts.dropped) == (1, 1)
    (line,) = dropped(tmp_path / "target")
    assert line["id"] == "iconqa_7"
    assert "died" in line["reason"]


def test_nothing_imported_is_an_error(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"problem": "?"}])
    with pytest.raises(UserError, match=r"none of 1 rows became a record: .*no answer"):
        imported(source, tmp_path / "target", "easyr1")


VALUES = st.one_of(
    st.none(), st.integers(), st.text(max_size=9), st.lists(st.text(max_size=4), max_size=3), st.floats()
)
GOOD = {"mantis": MANTIS[0], "mmk12": MMK12[0], "verl": VERL[0], "easyr1": EASYR1[0], "jsonl": PLAIN[1], "records": {}}


@pytest.mark.parametrize("format", GOOD)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_bad_row_is_always_dropped_with_its_place_and_reason(format, data, tmp_path):
    names = st.sampled_from([*GOOD[format], "id", "images", "text", "answer", "contract", "image"])
    row = GOOD[format] | data.draw(st.dictionaries(names, VALUES, max_size=3))
    (outcomes,) = convert_rows(
        [NumberedRow("a.jsonl:3", "a:3", row)], settings=settings_for(tmp_path / "x", tmp_path, format)
    )
    for outcome in outcomes:
        assert outcome.where == "a.jsonl:3"
        assert (outcome.line is None) == bool(outcome.reason)
        if outcome.line is None and isinstance(row.get("id"), str) and row["id"].strip():
            assert outcome.id is not None
