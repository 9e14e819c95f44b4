import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from growth import is_linear
from PIL import Image

from perl_megatron.data.records import DroppedRecord, read_records, write_records
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, Grading, PermutationContract, Record, ReferenceRule


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "scans").mkdir()
    for name in ("a", "b", "c"):
        Image.new("L", (28, 28), ord(name)).save(tmp_path / "scans" / f"{name}.png")
    return tmp_path


def line(**changes) -> dict:
    """A good line with changes; a key whose value is ... is left out."""
    good = {"id": "q1", "images": ["scans/a.png", "scans/b.png"], "text": "<image><image>\nImage 2?", "answer": "7"}
    return {key: value for key, value in (good | changes).items() if value is not ...}


def written(folder: Path, *lines: dict | str | bytes) -> Path:
    encoded = [
        item if isinstance(item, bytes) else (item if isinstance(item, str) else json.dumps(item)).encode()
        for item in lines
    ]
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(encoded))
    return path


def test_records_survive_the_round_trip(folder):
    records = [
        Record(
            id="é1",
            images=(folder / "scans/a.png", folder / "scans/b.png", folder / "scans/a.png"),
            text="<image><image><image>\nWhich is it, image 1 or the second image?\n(A) 1 (B) 2 (C) none",
            answer="B",
            answer_type="choice",
            kind="find",
            contract=PermutationContract(
                (0, 1), (ReferenceRule.INDEX, ReferenceRule.ORDINAL), AnswerRule.OPTION_LETTER, (0, 1, None)
            ),
            grading=Grading(("image 1", "the second image", "neither"), 0.5, 0.01, "cm"),
            demonstration="<think>12</think>\\boxed{B}",
        ),
        Record(id="plain", images=(), text="1 + 1?", answer="2", answer_type="number"),
    ]
    path = folder / "train.jsonl"
    write_records(path, records)
    dataset = read_records(path, max_corrupt_fraction=0)
    assert dataset.dropped == ()
    assert dataset.records == tuple(
        replace(record, source=f"{path}:{number}") for number, record in enumerate(records, start=1)
    )
    assert sorted(item.name for item in folder.iterdir()) == ["scans", "train.jsonl"]


def test_defaults_blank_lines_and_byte_order_marks(folder):
    path = written(
        folder, b"\xef\xbb\xbf" + json.dumps(line()).encode(), "", " \r", json.dumps(line(id="q2")) + "\r", ""
    )
    first, second = read_records(path, max_corrupt_fraction=0).records
    assert (first.answer_type, first.kind, first.contract, first.demonstration) == (
        "text",
        "",
        PermutationContract(),
        None,
    )
    assert second.source == f"{path}:4"


@pytest.mark.parametrize(
    ("bad", "record_id", "reason"),
    [
        ("{", None, "Invalid JSON"),
        (b'{"id": "\xff"}', None, "Invalid JSON"),
        ("[1]", None, "object"),
        (line(id=...), None, "id: Field required"),
        (line(id=""), None, "id: "),
        (line(id=5), None, "id: "),
        (line(answer=7), None, "answer: "),
        (line(colour="red"), None, "colour: Extra inputs"),
        (line(contract={"moveable": [0]}), None, "contract.moveable: Extra inputs"),
        (line(contract={"references": ["indexed"]}), None, "contract.references.0: "),
        (line(contract={"movable": [0, 0.5]}), None, "contract.movable.1: "),
        (line(text="<image>"), "q1", "1 <image> placeholders for 2 images"),
        (line(contract={"movable": [0, 2]}), "q1", "not all among the slots"),
        (line(text="<image><image>image 3", contract={"references": ["index"]}), "q1", "does not exist"),
        (line(images=["scans/a.png", "scans/missing.png"]), "q1", r"image file not found \[.*scans/missing\.png\]"),
        (line(images=["scans/a.png", "scans/cut.png"]), "q1", r"cannot read the image: .*scans/cut\.png"),
        (line(images=["scans/a.png", "train.jsonl"]), "q1", r"no image of a known format begins like .*train\.jsonl"),
        (line(images=["scans/a.png", "scans"]), "q1", "cannot read the image"),
        (line(images=["scans/a.png", "a\u0000b"]), "q1", r"path 'a.x00b' has a character that no file's name can have"),
        (line(images=["scans/a.png", "\ud800.png"]), None, "Invalid JSON"),
        (line(images=["scans/a.png", "scans/pipe.png"]), "q1", "cannot read the image: .*not a regular file"),
        (line(images=["scans/a.png", "scans/away.png"]), "q1", r"scans/away.png is a link .*data\.follow_links=true"),
        (line(images=["scans/a.png", "x" * 5000]), "q1", "cannot read the image"),
        (line(images=["scans/a.png", "../secret.png"]), "q1", "leaves the dataset's folder"),
        (line(images=["scans/a.png", "scans/../../secret.png"]), "q1", "leaves the dataset's folder"),
        (line(images=["scans/a.png", "/etc/passwd"]), "q1", "leaves the dataset's folder"),
        (line(id="good"), "good", r"the id is used before, by .*train\.jsonl:1"),
    ],
)
def test_a_bad_record_is_dropped_and_named(bad, record_id, reason, folder):
    (folder / "scans/cut.png").write_bytes((folder / "scans/a.png").read_bytes()[:50])
    os.mkfifo(folder / "scans/pipe.png")
    (folder / "scans/away.png").symlink_to(folder.parent / "secret.png")
    Image.new("L", (28, 28)).save(folder.parent / "secret.png")
    path = written(folder, line(id="good"), bad, line(id="other"))
    dataset = read_records(path, max_corrupt_fraction=0.5)
    assert [record.id for record in dataset.records] == ["good", "other"]
    (dropped,) = dataset.dropped
    assert (dropped.where, dropped.id) == (f"{path}:2", record_id)
    assert re.search(reason, dropped.reason), dropped.reason
    assert read_records(path, max_corrupt_fraction=1 / 3).dropped == (dropped,)
    with pytest.raises(
        UserError, match=r"(?s)1 of 3 records cannot be used.*train\.jsonl:2.*max_corrupt_fraction \(0\.3\)"
    ):
        read_records(path, max_corrupt_fraction=0.3)


def test_a_bad_first_copy_does_not_use_up_its_id(folder):
    path = written(folder, line(images=["missing.png", "scans/a.png"]), line())
    dataset = read_records(path, max_corrupt_fraction=0.5)
    assert [record.source for record in dataset.records] == [f"{path}:2"]


def test_the_first_bad_records_are_listed(folder):
    path = written(folder, *["{"] * 8)
    with pytest.raises(UserError) as refused:
        read_records(path, max_corrupt_fraction=1)
    message = str(refused.value)
    assert "8 of 8 records" in message
    assert f"{path}:5" in message
    assert f"{path}:6" not in message
    assert "and 3 more" in message


def test_missing_and_empty_datasets_are_refused(folder):
    for content in (b"", b"\n \n"):
        path = written(folder, content)
        with pytest.raises(UserError, match=r"(?s)empty.*train\.jsonl"):
            read_records(path, max_corrupt_fraction=1)
    for path in (folder / "missing.jsonl", folder):
        with pytest.raises(UserError, match=str(path)):
            read_records(path, max_corrupt_fraction=1)


def test_images_outside_the_folder_are_not_written(folder):
    Image.new("L", (28, 28)).save(folder.parent / "outside.png")
    record = Record(id="q", images=(folder.parent / "outside.png",), text="<image>", answer="1")
    with pytest.raises(UserError, match="outside the dataset's folder"):
        write_records(folder / "train.jsonl", [record])
    assert [item.name for item in folder.iterdir()] == ["scans"]


def test_dropped_records_print_on_one_line():
    assert str(DroppedRecord("a.jsonl:3", "q", "bad")) == "a.jsonl:3 (q): bad"
    assert str(DroppedRecord("a.jsonl:3", None, "bad")) == "a.jsonl:3: bad"


def test_thousands_of_small_images_are_checked_in_linear_time(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    names = [f"scans/{number}.png" for number in range(2000)]
    for name in names:
        Image.fromarray(pixels).save(folder / name)

    def read(size):
        path = written(folder, *[line(id=name, images=[name, names[0]]) for name in names[:size]])
        assert len(read_records(path, max_corrupt_fraction=0).records) == size

    assert is_linear(read, 2000)
