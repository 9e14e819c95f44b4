"""Rows of Mantis-Instruct become questions, or are dropped by a rule that is named."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path

import pytest
from mantis_case import png, row
from PIL import Image

from perl_megatron.data.image_store import ImageStore
from perl_megatron.data.images import load_image
from perl_megatron.data.row_formats import MAX_TEXT, read_mantis
from perl_megatron.errors import UserError
from perl_megatron.preparation.question import Dropped, Kept, Question
from perl_megatron.preparation.rules import AlreadyDone, apply_rules, latin_share
from perl_megatron.preparation.settings import RuleSettings, SourceSettings
from perl_megatron.preparation.table_images import TableImages

TWO = [png(1), png(2, (28, 56))]


def write(path: Path, *rows: dict) -> Path:
    """JSON lines; images that are bytes become files beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = copy.deepcopy(rows)
    for number, each in enumerate(rows):
        for k, image in enumerate(each.get("images") or []):
            if isinstance(image, dict) and image["bytes"]:
                name = f"{path.stem}-{number}-{k}.png"
                (path.parent / name).write_bytes(image["bytes"])
                each["images"][k] = name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def decide(tmp_path: Path, *rows: dict, folder: Path | None = None, done: set[str] = frozenset(), **rules: object):  # type: ignore[assignment]
    path = write(tmp_path / "source" / "train.jsonl", *rows)
    source = {key: rules.pop(key) for key in ("turns", "exclude", "images") if key in rules}
    return list(
        apply_rules(SourceSettings(path=path, **source), RuleSettings(**rules), folder or tmp_path / "out", done)  # type: ignore[arg-type]
    )


def reasons(outcomes: list) -> list[str | None]:
    return [outcome.reason if isinstance(outcome, Dropped) else None for outcome in outcomes]


def test_a_question_with_options(tmp_path):
    text = "Which one is it?\n(A) the first\n(B) the second"
    (kept,) = decide(tmp_path, row("a", text, "(B)", TWO))
    question = kept.question
    assert question == Question(
        id="a",
        source="train.jsonl:1",
        images=question.images,
        image_sizes=((40, 30), (28, 56)),
        text="<image><image>\nWhich one is it?",
        options=("the first", "the second"),
        answer="B",
    )
    assert [(tmp_path / "out" / image).read_bytes() for image in question.images] == TWO
    assert question.full_text() == f"<image><image>\n{text}"


def test_an_open_question(tmp_path):
    (kept,) = decide(tmp_path, row("a", "What is on both of them?", "a cat", TWO))
    assert (kept.question.options, kept.question.answer) == ((), "a cat")


def test_published_spellings_of_a_conversation(tmp_path):
    turns = [
        {"from": "human", "value": "<image><image> What is on both?"},
        {"from": "gpt", "value": "a cat"},
    ]
    plain = row("a", "What is on both?", "a cat", TWO)
    other = {"id": "b", "images": plain["images"], "conversations": turns}
    outcomes = decide(tmp_path, {**plain, "images": list(plain["images"])}, other, drop_duplicates=False)
    assert [outcome.question.answer for outcome in outcomes] == ["a cat", "a cat"]


@pytest.mark.parametrize(
    ("change", "rules", "reason"),
    [
        ({}, {"kinds": ("choice",)}, "the question type is 'open'"),
        ({}, {"min_images": 3}, "fewer than 3 images"),
        ({}, {"max_images": 1}, "more than 1 images"),
        ({}, {"min_question_characters": 30}, "the question is too short"),
        ({}, {"max_question_characters": 10}, "the question is too long"),
        ({}, {"max_answer_characters": 3}, "the answer is too long"),
        ({"conversation": None}, {}, "conversation is no list"),
        ({"conversation": ["What?"]}, {}, "a message of the chat is no object with role and content"),
        ({"conversation": [{"role": "user", "content": None}]}, {}, "a message of the chat has no role or no text"),
        (
            {"conversation": [{"role": "user", "content": "What?"}]},
            {},
            "the conversation has no answer of an assistant",
        ),
        (
            {"conversation": [{"role": "assistant", "content": "Hi"}]},
            {},
            "the conversation has no answer of an assistant",
        ),
        ({"images": ["gone.png", "gone.png"]}, {}, "an image cannot be read"),
        ({"images": ["../up.png", "/etc/passwd"]}, {}, "an image cannot be read"),
        ({"images": [{"bytes": None, "path": None}, 3]}, {}, "an image has neither bytes nor a path"),
        ({"images": None}, {}, "the conversation has more <image> placeholders than images"),
    ],
)
def test_each_rule(tmp_path, change, rules, reason):
    good = row("a", "What is on both of them?", "a cat", TWO)
    assert reasons(decide(tmp_path, {**good, **change}, **rules)) == [reason]


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("What is on both of them?", "", "the answer is empty"),
        ("Что на обоих изображениях?", "кот", "too few Latin letters"),
        ("What is it? (A) a cat (B) a dog", "a bird", "the answer is none of the options"),
        ("What is it? (A) a cat (B) a dog", "A. a dog", "the answer is none of the options"),
        ("What is it? (A) a cat (B) a dog", "B" + "." * MAX_TEXT, "a text has more than 100000 characters"),
        ("A. " * MAX_TEXT, "A", "a text has more than 100000 characters"),
        ("Où se trouve le garçon sur les deux?", "à l'école", None),
    ],
)
def test_rules_of_text(tmp_path, text, answer, reason):
    assert reasons(decide(tmp_path, row("a", text, answer, TWO))) == [reason]


def test_rows_are_read_as_the_import_reads_them(tmp_path):
    """An id 0 is one; images without a placeholder go first, turns of one speaker are joined, contents may be lists."""
    part = {"type": "text", "text": "What is on"}
    turns = [
        {"role": "user", "content": [{"type": "image"}, part]},
        {"role": "user", "content": "both of them?"},
        {"role": "assistant", "content": " a cat"},
    ]
    (kept,) = decide(tmp_path, {**row("a", "", "", TWO), "id": 0, "conversation": turns})
    assert (kept.question.id, kept.question.answer) == ("0", "a cat")
    assert kept.question.text == "<image>\n<image>What is on\nboth of them?"
    (draft,) = read_mantis({"id": 0, "images": TWO, "conversation": turns})
    assert (draft.id, draft.text, draft.answer.strip()) == ("0", kept.question.text, "a cat")


def test_duplicates_and_equal_ids(tmp_path):
    good = row("a", "What is on both of them?", "a cat", TWO)
    spaced = row("b", "What  is on BOTH of them?", "A cat", TWO)
    others = row("a", "What is on both of them?", "a cat", TWO[::-1])
    outcomes = decide(tmp_path, good, spaced, others)
    assert reasons(outcomes) == [None, "it is a duplicate", None]
    assert [outcomes[0].question.id, outcomes[1].id, outcomes[2].question.id] == ["a", "b", "a#2"]


def test_what_is_done_still_counts_as_seen(tmp_path):
    rows = [row("a", "What is on both of them?", "a cat", TWO), row("b", "What is on both of them?", "a cat", TWO)]
    outcomes = decide(tmp_path, *rows, done={"a"})
    assert outcomes[0] == AlreadyDone("a")
    assert reasons(outcomes[1:]) == ["it is a duplicate"]


def test_later_turns(tmp_path):
    conversation = row("a", "What is on both of them?", "a cat", TWO)
    conversation["conversation"] += [
        {"role": "user", "content": "And what colour is it there?"},
        {"role": "assistant", "content": "black"},
    ]
    assert len(decide(tmp_path, conversation)) == 1
    first, second = decide(tmp_path, conversation, turns="all")
    assert (first.question.id, second.question.id) == ("a", "a/turn2")
    assert second.question.text == "<image><image>\nAnd what colour is it there?"
    assert second.question.images == first.question.images


def test_rows_that_are_no_json_are_named(tmp_path):
    path = write(tmp_path / "train.jsonl", row("a", "What is on both of them?", "a cat", TWO))
    path.write_text("{broken\n" + path.read_text() + "[]\n")
    outcomes = list(apply_rules(SourceSettings(path=path), RuleSettings(), tmp_path / "out", ()))
    assert [isinstance(outcome, Kept) for outcome in outcomes] == [False, True, False]
    assert outcomes[0].id == "train.jsonl:1"


def test_subsets_can_be_left_out(tmp_path):
    for name in ("nlvr2", "llava"):
        write(tmp_path / "source" / name / "train.jsonl", row(name, "What is on both of them?", name, TWO))
    source = SourceSettings(path=tmp_path / "source", exclude=("*/llava/*",))
    outcomes = list(apply_rules(source, RuleSettings(), tmp_path / "out", ()))
    assert [outcome.question.source for outcome in outcomes] == ["nlvr2/train.jsonl:1"]


def test_a_dry_run_writes_nothing(tmp_path):
    path = write(tmp_path / "source" / "train.jsonl", row("a", "What is on both of them?", "a cat", TWO))
    before = sorted(tmp_path.rglob("*"))
    (kept,) = apply_rules(SourceSettings(path=path), RuleSettings(), None, ())
    assert (kept.question.images, kept.question.image_sizes) == ((), ((40, 30), (28, 56)))
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_are_those_of_the_upright_image(tmp_path):
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30)).save(rotated, exif=exif)
    (kept,) = decide(tmp_path, row("a", "What is on both of them?", "a cat", [rotated.read_bytes(), TWO[0]]))
    path = tmp_path / "out" / kept.question.images[0]
    assert kept.question.image_sizes[0] == (30, 60)
    assert load_image(path, 784, 10**6).height > load_image(path, 784, 10**6).width


@pytest.mark.parametrize("prefix", ["", "nlvr2/"])
def test_images_in_a_zip_file_beside_the_table(tmp_path, prefix):
    folder = tmp_path / "nlvr2"
    folder.mkdir()
    with zipfile.ZipFile(folder / "train_images.zip", "w") as archive:
        archive.writestr(f"{prefix}a/1.png", TWO[0])
    images = TableImages(None)
    assert images.read("a/1.png", folder / "train.parquet") == TWO[0]
    with pytest.raises(UserError, match="is not there"):
        images.read("a/2.png", folder / "train.parquet")
    images.close()


def test_images_in_a_folder_of_their_own(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(TWO[0])
    images = TableImages(tmp_path / "pictures")
    assert images.read("1.png", tmp_path / "elsewhere" / "train.json") == TWO[0]
    assert images.read(b"bytes", tmp_path) == b"bytes"


def test_a_broken_zip_file_is_named(tmp_path):
    (tmp_path / "train_images.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="cannot read the image"):
        TableImages(None).read("a.png", tmp_path / "train.parquet")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_image_that_is_damaged_within_its_zip_file_is_dropped(tmp_path, method):
    (tmp_path / "source").mkdir()
    archive_path = tmp_path / "source" / "train_images.zip"
    with zipfile.ZipFile(archive_path, "w", method) as archive:
        archive.writestr("x.png", b"abc" * 10_000)
    content = bytearray(archive_path.read_bytes())
    content[45:60] = b"\xff" * 15  # within the compressed stream
    archive_path.write_bytes(content)
    good, bad = (row(name, "What is on both of them?", "a cat", TWO) for name in "ab")
    outcomes = decide(tmp_path, {**bad, "images": ["x.png", "x.png"]}, good)
    assert reasons(outcomes) == ["an image cannot be read", None]
    assert "cannot read the image 'x.png'" in outcomes[0].detail


def test_a_full_disk_ends_the_run_instead_of_dropping_questions(tmp_path, monkeypatch):
    def full(store: ImageStore, content: bytes) -> Path:
        raise UserError("cannot write an image: No space left on device")

    monkeypatch.setattr(ImageStore, "add", full)
    with pytest.raises(UserError, match="No space left"):
        decide(tmp_path, row("a", "What is on both of them?", "a cat", TWO))


def test_images_that_training_would_refuse_are_refused(tmp_path):
    long = png(5, (1000, 4))
    outcomes = decide(tmp_path, row("a", "What is on both of them?", "a cat", [TWO[0], long]))
    assert reasons(outcomes) == ["an image cannot be read"]
    assert "aspect ratio" in outcomes[0].detail
    assert not (tmp_path / "out").exists()  # nothing is kept of a question that is dropped


def test_latin_letters():
    assert latin_share("123 !?") == 1
    assert latin_share("aé") == 1
    assert latin_share("a是") == 0.5
