"""Files that an interruption can tear anywhere, and that read as if it had not happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.errors import UserError
from perl_megatron.preparation.manifest import Manifest, file_fingerprint, fingerprint
from perl_megatron.preparation.question import Dropped, Kept, OrderLabel, Question, Unanswered
from perl_megatron.preparation.stage_files import StageCounts, StageFiles, refuse_unanswered

QUESTION = Question(
    id="0",
    source="t:1",
    images=("images/a.png",),
    image_sizes=((28, 28),),
    text="\u2028\ud800 <image>",
    options=("x", "y"),
    answer="A",
    question_type="Other",
    accuracy=0.3,
    label=OrderLabel(should_change=True, is_multichoice_images=False),
)


def outcomes(count: int, start: int = 0) -> list:
    """Every third one is dropped."""
    return [
        Dropped(str(k), "t:1", f"reason {k % 2}", "detail", {"reply": str(k)})
        if k % 3 == 2
        else Kept(replace(QUESTION, id=str(k)), {"reply": str(k)})
        for k in range(start, count)
    ]


def contents(files: StageFiles) -> list[bytes]:
    return [path.read_bytes() if path.exists() else b"" for path in files.paths]


def test_what_is_written_is_read(tmp_path: Path):
    files, counts = StageFiles(tmp_path, 2, "rephrase"), StageCounts()
    files.write([*outcomes(6), Unanswered("6", "no answer")], counts)
    files.finish([str(k) for k in range(7)])
    assert [question.id for question in files.questions()] == ["0", "1", "3", "4"]
    assert next(iter(files.questions())) == QUESTION
    assert [row["id"] for row in files.raw_outputs()] == [str(k) for k in range(6)]
    done, again = files.decided()
    assert done == {str(k) for k in range(6)}
    assert again.values() == {"in": 6, "out": 4, "dropped": {"reason 0": 1, "reason 1": 1}, "unanswered": {}}
    assert (counts.num_in, counts.unanswered) == (7, {"no answer": 1})
    with pytest.raises(UserError, match=r"1 of 7 questions were not answered: no answer \(1\)"):
        refuse_unanswered("rephrase", counts)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "02_rephrase.dropped.jsonl",
        "02_rephrase.jsonl",
        "02_rephrase.raw.jsonl",
    ]


@settings(deadline=None, max_examples=80)
@given(written=st.integers(0, 9), num_bytes=st.integers(0, 700))
def test_whatever_was_written_last_is_mended(tmp_path_factory, written, num_bytes):
    """A process that dies has written some of an outcome's bytes: of its raw output first, then of its own line."""
    whole, torn, extra = (StageFiles(tmp_path_factory.mktemp(name), 1, "s") for name in ("whole", "torn", "extra"))
    whole.write(outcomes(10), StageCounts())
    torn.write(outcomes(written), StageCounts())
    extra.write(outcomes(written + 1, start=written), StageCounts())
    for path, last in sorted(
        zip(torn.paths, contents(extra), strict=True), key=lambda pair: ".raw" not in str(pair[0])
    ):
        with path.open("ab") as file:
            file.write(last[:num_bytes])
        num_bytes = max(0, num_bytes - len(last))
    torn.mend()
    done, counts = torn.decided()
    torn.write([each for number, each in enumerate(outcomes(10)) if str(number) not in done], counts)
    torn.finish([str(number) for number in range(10)])
    assert contents(torn) == contents(whole)
    assert counts.num_in == 10


def test_late_answers_are_put_in_their_place(tmp_path: Path):
    files = StageFiles(tmp_path, 1, "s")
    every = outcomes(9)
    files.write([every[k] for k in (0, 3, 8, 4, 1, 2, 7, 5, 6)], StageCounts())
    files.finish([str(k) for k in range(9)])
    ordered = StageFiles(tmp_path / "..", 7, "ordered")
    ordered.write(every, StageCounts())
    assert contents(files) == contents(ordered)
    for path in ordered.paths:
        path.unlink()


def test_a_stage_that_keeps_nothing_is_a_stage(tmp_path: Path):
    files = StageFiles(tmp_path, 1, "s")
    files.write([], StageCounts())
    files.finish([])
    assert list(files.questions()) == []
    assert files.paths[0].exists()


def test_lines_of_another_version_are_refused(tmp_path: Path):
    (tmp_path / "01_s.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match="not a question of this version") as caught:
        list(StageFiles(tmp_path, 1, "s").questions())
    assert caught.value.where == f"{tmp_path / '01_s.jsonl'}:1"


def test_the_manifest(tmp_path: Path):
    manifest = Manifest(tmp_path)
    assert manifest.is_stale("rules", "x")
    manifest.note("rules", "x", finished=False)
    manifest.note("label", "y", finished=True)
    again = Manifest(tmp_path)
    assert not again.is_stale("rules", "x")
    assert again.is_stale("rules", "z")
    assert (again.is_finished("rules", "x"), again.is_finished("label", "y")) == (False, True)
    file = tmp_path / "05_label.jsonl"
    file.write_text("old")
    assert again.put_aside(["label"], [file, tmp_path / "none"]) == tmp_path / "replaced" / "1"
    assert (tmp_path / "replaced" / "1" / "05_label.jsonl").read_text() == "old"
    assert Manifest(tmp_path).is_stale("label", "y")
    assert again.put_aside(["label"], [file]) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stages": 3}'])
def test_a_manifest_that_cannot_be_read(tmp_path: Path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest cannot be read"):
        Manifest(tmp_path)


def test_fingerprints(tmp_path: Path):
    assert fingerprint(1, {"a": [2]}) == fingerprint(1, {"a": [2]}) != fingerprint(1, {"a": [3]})
    file = tmp_path / "table"
    marks = []
    for content in (b"a", b"b", b"ab", bytes(3 * 2**20), bytes(3 * 2**20 - 1) + b"x", b"x" + bytes(3 * 2**20 - 1)):
        file.write_bytes(content)
        marks.append(file_fingerprint(file))
    assert len(set(marks)) == len(marks)
    json.dumps(marks)
